"""Students beside their twins: what a teacher taught, on the same test examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.controls import twin_name
from pipeline.results import (
    Difference,
    Results,
    Row,
    compare_paired,
    difference_to,
    is_of_another_size,
    number,
    percent,
    share_kept,
)

from .evidence import Evidence
from .formatting import colours_of, signed
from .overview import NOT_MEASURABLE


class Versus(NamedTuple):
    """A difference as text.  word: "better", "worse" or that none is measurable."""

    text: str
    word: str


@dataclass(frozen=True)
class StudentRow:
    """A student, and its twin, which learned from labels alone. twin: None where none was trained.

    nll: calibrated where the run has it.  size: its parameters over the generalist's.
    kept: the share of the ensemble's gain, or why there is none.
    """

    name: str
    colour: str
    size: float | None
    top1: str
    nll: str
    twin: str | None
    twin_top1: str
    twin_nll: str
    top1_versus: Versus | None
    nll_versus: Versus | None
    kept: str


@dataclass(frozen=True)
class StudentSection:
    """calibrated: whether the NLLs are after temperature scaling.  n: test examples.

    nll_paired: whether their difference is known with an interval.
    """

    rows: list[StudentRow]
    calibrated: bool
    nll_paired: bool
    n: int


def student_section(evidence: Evidence) -> StudentSection | None:
    """None of a run without students."""
    results = evidence.results
    students = results["students"]
    if not students:
        return None
    calibrated = all(row.get("cnll") is not None for row in evidence.rows.values())
    rows = [_student_row(evidence, name, calibrated) for name in students]
    return StudentSection(
        rows=rows,
        calibrated=calibrated,
        nll_paired=any(row.nll_versus is not None for row in rows),
        n=results["ensemble"]["n"],
    )


def _student_row(evidence: Evidence, name: str, calibrated: bool) -> StudentRow:
    results, metric = evidence.results, "cnll" if calibrated else "nll"
    student, generalist = results["students"][name], results["generalist"]
    twin_called = twin_name(name)
    twin = results["controls"].get(twin_called) or results["students"].get(twin_called)
    return StudentRow(
        name=name,
        colour=colours_of(evidence.rows)[f"student {name}"],
        size=_size(student, generalist),
        top1=percent(student["top1"]),
        nll=number(student.get(metric)),
        twin=twin_called if twin is not None else None,
        twin_top1=percent(twin["top1"] if twin is not None else None),
        twin_nll=number(twin.get(metric) if twin is not None else None),
        top1_versus=_top1_versus(difference_to(student, twin_called, "top1")),
        nll_versus=_nll_versus(difference_to(student, twin_called, metric)),
        kept=_kept(student, results),
    )


def _size(student: Row, generalist: Row) -> float | None:
    own, others = student.get("parameters"), generalist.get("parameters")
    return own / others if own and others else None


def _top1_versus(difference: Difference | None) -> Versus | None:
    if difference is None:
        return None
    text = f"{signed(100 * difference.value, 2)} ± {100 * difference.half:.2f}"
    return Versus(text, _word(difference, better=difference.value > 0))


def _nll_versus(difference: Difference | None) -> Versus | None:
    if difference is None:
        return None
    text = f"{signed(difference.value, 3)} ± {difference.half:.3f}"
    return Versus(text, _word(difference, better=difference.value < 0))


def _word(difference: Difference, better: bool) -> str:
    if not difference.is_measurable:
        return NOT_MEASURABLE
    return "better" if better else "worse"


def _kept(student: Row, results: Results) -> str:
    """The share of the ensemble's gain in top-1 that it keeps, of 100 % at most. Or why none."""
    generalist, ensemble = results["generalist"], results["ensemble"]
    if is_of_another_size(student, generalist):
        return "another size"
    if compare_paired(ensemble, "generalist", generalist, "top1") <= 0:
        return "no gain to keep"
    if compare_paired(student, "generalist", generalist, "top1") <= 0:
        return "none"
    return percent(share_kept(student, results), 0)
