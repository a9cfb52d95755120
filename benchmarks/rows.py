"""Rows of the benchmarks on huge label sets: {"top1", "nll", "multiplications", ...} by name.

Every row has

    top1, nll          on test
    multiplications    of one example's answer, on average
    parameters         of all networks that answer
    seconds            of training, of all networks that answer
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from networks import load_classifier, multiplications, parameter_count


class Cost(NamedTuple):
    """What an answer takes: multiplications of one example, parameters."""

    multiplications: int
    parameters: int

    def __add__(self, other: tuple) -> Cost:
        return Cost(self[0] + other[0], self[1] + other[1])


def cost_of_network(path: Path) -> Cost:
    """Of a saved network."""
    network = load_classifier(path)
    return Cost(multiplications(network, network.zero_input()), parameter_count(network))


def cost_of_opinion(path: Path, shortlist: int) -> Cost:
    """Of a saved network that is asked about `shortlist` classes alone: its trunk, and rows."""
    network = load_classifier(path)
    whole, head = cost_of_network(path), network.linear_head.weight
    rows = min(shortlist, len(head))
    return Cost(whole.multiplications - (len(head) - rows) * head.shape[1], whole.parameters)


def row_of(measured: dict, cost: Cost) -> dict:
    """measured: a row of results.json."""
    return {
        "top1": measured["top1"],
        "nll": measured["nll"],
        "multiplications": cost.multiplications,
        "parameters": cost.parameters,
        "seconds": measured["cost"]["seconds"],
    }


def table(rows: dict[str, dict], columns: Iterable[str] = ()) -> str:
    """One line a row.  columns: further keys, percentages where a row has them."""
    width = max(map(len, rows))
    lines = [f"{'':{width}}  top-1     NLL  multiplications   parameters  seconds"]
    lines[0] += "".join(f"  {name}" for name in columns)
    for name, row in rows.items():
        line = (
            f"{name:{width}} {row['top1']:6.2%}  {row['nll']:6.3f}  "
            f"{row['multiplications']:15,}  {row['parameters']:11,}  {row['seconds']:7.0f}"
        )
        for column in columns:
            value = row.get(column)
            shown = "" if value is None else f"{value:.1%}"
            line += f"  {shown:>{len(column)}}"
        lines.append(line)
    return "\n".join(lines)
