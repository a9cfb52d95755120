"""A head that learns by rows under every engine, on two ranks."""

import pytest
from ranks import ENGINES, on_ranks

STEPS = ENGINES / "row_steps.py"


def test_two_ranks_step_rows_as_one_process_does_by_hand():
    """Rows that both ranks have read, two parts of a batch, and a new engine that goes on."""
    assert on_ranks(2, STEPS, "ddp").count("agrees") == 2


@pytest.mark.engines
@pytest.mark.slow
def test_deepspeed_steps_rows_as_one_process_does_by_hand():
    assert on_ranks(2, STEPS, *(f"zero{stage}" for stage in range(4))).count("agrees") == 8
