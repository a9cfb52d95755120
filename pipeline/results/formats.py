"""Numbers as people read them. What is absent is a dash."""

from __future__ import annotations

import math

ABSENT = "–"


def percent(fraction: float | None, digits: int = 2) -> str:
    """78.25 %"""
    if fraction is None:
        return ABSENT
    return f"{100 * fraction:.{digits}f} %"


def number(value: float | None) -> str:
    """1.2345"""
    if value is None:
        return ABSENT
    return f"{value:.4f}"


def count(value: float | None) -> str:
    """1,234 or 3.10 M"""
    if value is None:
        return ABSENT
    if value < 1e6:
        return f"{value:,.0f}"
    return f"{value / 1e6:,.2f} M"


def milliseconds(value: float | None) -> str:
    """0.0123 ms or 12.3 ms: three digits that count"""
    if value is None:
        return ABSENT
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-4))))}f}"


def mean_words(order: float) -> str:
    """The geometric mean, the arithmetic mean, or a generalised mean of order 0.25"""
    if order in (0, 1):
        return "the arithmetic mean" if order else "the geometric mean"
    return f"a generalised mean of order {order:g} (0 geometric, 1 arithmetic)"


def duration(seconds: float | None) -> str:
    """4.2 s, 3 min 05 s or 2 h 07 min"""
    if seconds is None:
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {rest:02d} s"
    return f"{seconds:.1f} s"
