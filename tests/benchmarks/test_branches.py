"""The benchmark of branches, with few classes and steps."""

import json

from benchmarks import branches


def test_its_last_line_is_a_row_of_each_kind(capsys):
    branches.main(["--quick"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = result["seeds"]
    assert row["branches"]["multiplications"] > row["branches"]["of_generalist"]
    assert row["copies"]["examples"] == row["branches"]["examples"]
    assert row["times_as_fast"] > 0
