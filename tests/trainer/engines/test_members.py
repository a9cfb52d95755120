"""Networks with members under every engine, on two ranks."""

import pytest
from ranks import ENGINES, on_ranks

STEPS = ENGINES / "member_steps.py"


def test_two_ranks_step_members_as_one_process_does_by_hand():
    """Gradients and weights. Rank-one factors take half the rate, and only weights decay."""
    assert on_ranks(2, STEPS, "ddp").count("agree") == 4


@pytest.mark.engines
@pytest.mark.slow
def test_deepspeed_steps_members_as_one_process_does_by_hand():
    assert on_ranks(2, STEPS, *(f"zero{stage}" for stage in range(4))).count("agree") == 16
