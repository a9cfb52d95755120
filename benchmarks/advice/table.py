"""Tables of truth.jsonl: what each lever gives, and what short trainings of it give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks.papers import lab

SHORT = ("020", "r0", "045", "r1", "070", "150")
# row -> short networks, the way to the gain in their row (none: alone), the lever in full
FAMILIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "on": ("on", (), "train_on"),
    "on_full": ("on_full", (), "train_on_full_rate"),
    "wide": ("wide", (), "wider"),
    "grown": ("grown", (), "grown"),
    "second alone": ("a", (), "second_alone"),
    "second, average": ("a", ("average",), "average_fitted"),
    "second, geometric": ("a", ("geometric",), "geometric"),
    "second, shortlist": ("a", ("shortlist",), "shortlist"),
    "another, shortlist": ("b", ("shortlist",), "shortlist"),
    "wide over fresh, same age": ("wide", ("same_age",), "wider"),
    "two fresh, average": ("b", ("same_age", "average"), "average"),
    "two fresh, geometric": ("b", ("same_age", "geometric"), "geometric"),
}


def read_lines(file: Path) -> list[dict]:
    """Of truth.jsonl. None where it is absent."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def by_set(lines: list[dict]) -> dict[str, list[dict]]:
    return {
        name: [line for line in lines if line["set"] == name]
        for name in dict.fromkeys(line["set"] for line in lines)
    }


def table_of(lines: list[dict]) -> str:
    """A row for each set: points over the generalist on test, and their standard error."""
    names = list(dict.fromkeys(name for line in lines for name in line["lever"]))
    rows = []
    for name, own in by_set(lines).items():
        tops = [
            f"{mean(line['generalist'][f'{split}_top1'] for line in own):.1f}"
            for split in ("train", "val", "test")
        ]
        cells = [cell(own, lambda line, lever=lever: line["lever"].get(lever)) for lever in names]
        rows.append([name, len(own), " / ".join(tops), *cells])
    return lab.table(["set", "seeds", "generalist train / val / test", *names], rows)


def short_table_of(lines: list[dict]) -> str:
    """A row for each set and family: points on test by the length of training, in full last."""
    rows = []
    for name, own in by_set(lines).items():
        for family, (network, way, lever) in FAMILIES.items():
            cells = [cell(own, short_row(f"{network}_{tag}", way)) for tag in SHORT]
            if any(cells):
                full = cell(own, lambda line, lever=lever: line["lever"].get(lever))
                rows.append([name, family, *cells, full])
    return lab.table(["set", "", *SHORT, "in full"], rows)


def short_row(network: str, way: tuple[str, ...]) -> Callable[[dict], dict | None]:
    def row_of(line: dict) -> dict | None:
        row = line["short"].get(network)
        for key in way:
            row = row.get(key) if row else None
        return row

    return row_of


def cell(lines: list[dict], row_of: Callable[[dict], dict | None]) -> str:
    rows = [row["test"] for row in map(row_of, lines) if row]
    if not rows:
        return ""
    # Seeds share test's examples: their errors are not independent, and are not divided by them.
    return f"{mean(row['top1'] for row in rows):+.2f} ± {mean(row['se'] for row in rows):.2f}"
