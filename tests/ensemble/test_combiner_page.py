"""docs/combiner.md: its example runs and gives what it says."""

import re
from pathlib import Path


def test_the_example_runs_and_gives_what_the_page_says():
    page = (Path(__file__).parents[2] / "docs" / "combiner.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(example, "docs/combiner.md", "exec"), names)
    assert names["active"].tolist() == [[True, False], [False, False]]
