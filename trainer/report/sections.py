"""The sections of the page in order: headings, which the navigation repeats, and which have any
content.  A section without content is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

Context = Mapping[str, object]


class Section(NamedTuple):
    """is_filled: whether the page's context has something to show in it."""

    id: str
    title: str
    is_filled: Callable[[Context], bool]


def _has(key: str) -> Callable[[Context], bool]:
    return lambda context: bool(context.get(key))


def _has_rows(key: str) -> Callable[[Context], bool]:
    return lambda context: bool(getattr(context.get(key), "rows", None))


def _is_deep(context: Context) -> bool:
    return bool(context["deep"])


def _has_changes(context: Context) -> bool:
    return any(part.total for part in context["examples"])  # type: ignore[attr-defined]


SECTIONS = [
    Section("advice", "What pilots advised", _has("advice")),
    Section("metrics", "Metrics", _has("rows")),
    Section("students", "Students beside their twins", _has("students")),
    Section("cost", "What it costs", _has("cost_rows")),
    Section("learning", "Learning curves", _has("curves")),
    Section(
        "diversity",
        "Ensemble size and diversity",
        lambda context: _is_deep(context) and bool(context["diversity"]),
    ),
    Section("groups", "The groups", _has("groups")),
    Section("fitted", "What was fitted to join them", _has("fitted")),
    Section("specialists", "Each specialist", _has_rows("specialists")),
    Section("coverage", "Gain by coverage", _has("coverage")),
    Section("classes", "Classes and confusions", _has("classes")),
    Section("frequency", "Rare and frequent classes", _has_rows("frequency")),
    Section(
        "calibration",
        "Calibration",
        lambda context: bool(context["calibration"] or context["reliability"].panels),  # type: ignore[attr-defined]
    ),
    Section(
        "diversity",
        "Diversity",
        lambda context: not _is_deep(context) and bool(context["diversity"]),
    ),
    Section("examples", "What changed", _has_changes),
    Section("run", "The run", _has("conditions")),
]


def shown(context: Context) -> dict[str, str]:
    """{id: heading} of the sections that have content, in the page's order."""
    return {each.id: each.title for each in SECTIONS if each.is_filled(context)}
