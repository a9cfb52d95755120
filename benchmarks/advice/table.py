"""The table of truth.jsonl: of each set the gain of each lever on test, a mean over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from benchmarks.papers import lab


def read_lines(file: Path) -> list[dict]:
    """Of truth.jsonl; none where it is absent."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table_of(lines: list[dict]) -> str:
    """A row for each set: points over the generalist on test, and their standard error."""
    names = list(dict.fromkeys(name for line in lines for name in line["lever"]))
    rows = []
    for name in dict.fromkeys(line["set"] for line in lines):
        own = [line for line in lines if line["set"] == name]
        tops = [
            f"{mean(line['generalist'][f'{split}_top1'] for line in own):.1f}"
            for split in ("train", "val", "test")
        ]
        rows.append([name, len(own), " / ".join(tops), *(cell(own, lever) for lever in names)])
    return lab.table(["set", "seeds", "generalist train / val / test", *names], rows)


def cell(lines: list[dict], lever: str) -> str:
    found = [line["lever"][lever]["test"] for line in lines if lever in line["lever"]]
    if not found:
        return ""
    # Seeds share test's examples: their errors are not independent, and are not divided by them.
    return f"{mean(row['top1'] for row in found):+.2f} ± {mean(row['se'] for row in found):.2f}"
