"""What every plot is drawn with: axes, ticks, dots and labels as escaped SVG.

A plot is 360 units wide, about a phone's width in pixels, so that its text is readable there and
larger elsewhere. Every colour is a CSS class k-COLOUR. Every text is escaped by Markup.format.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 24, 36
CHARACTER = 7.0  # units of a label's width that one character takes, at most

Point = tuple[float, float]
Range = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


# Numbers on an axis


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between low and high.

    Over more than two decades the powers alone. Below half a decade the round numbers of `ticks`.
    """
    if high / low < 4:
        return [value for value in ticks(low, high) if value > 0]
    factors = (1,) if high / low > 100 else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [factor * 10.0**decade for decade, factor in itertools.product(decades, factors)]
    return [value for value in values if low * 0.999 <= value <= high * 1.001]


def short(value: float) -> str:
    """12k, 3.5M, 0.25: a number for an axis."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def whole_percent(value: float) -> str:
    return f"{100 * value:.3g} %"


# From data to the drawing


class Frame:
    """Maps data to drawing coordinates, with axes around the plotted points."""

    def __init__(
        self, points: Iterable[Point], log_x: bool = False, log_y: bool = False, pad: float = 0.04
    ):
        points = list(points)
        self.log_x, self.log_y = log_x, log_y
        self.x_range = _padded_range([x for x, _ in points], log_x, pad)
        self.y_range = _padded_range([y for _, y in points], log_y, max(pad, 0.06))

    def locate(self, x: float, y: float) -> Point:
        """Where (x, y) of the data lies on the drawing. y grows downwards there."""
        right = _fraction(x, self.x_range, self.log_x)
        up = _fraction(y, self.y_range, self.log_y)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def axes(
        self,
        x_label: str,
        y_label: str,
        x_text: Callable[[float], str],
        y_text: Callable[[float], str],
        x_ticks: Sequence[tuple[float, object]] | None = None,
    ) -> Markup:
        """Grid lines, tick texts and labels. x_ticks: (value, text) in place of round numbers."""
        parts = []
        for value in _ticks_of(self.y_range, self.log_y):
            _, y = self.locate(self.x_range[0], value)
            line = Markup('<path class="grid" d="M{} {:.1f} H{}"/>')
            parts.append(line.format(LEFT, y, WIDTH - RIGHT))
            parts.append(text(LEFT - 6, y + 3.5, y_text(value), "tick end"))
        if x_ticks is None:
            x_ticks = [(value, x_text(value)) for value in _ticks_of(self.x_range, self.log_x)]
        for value, words in x_ticks:
            x, _ = self.locate(value, self.y_range[0])
            parts.append(text(x, HEIGHT - BOTTOM + 14, words, "tick middle"))
        middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
        parts.append(text(middle, HEIGHT - 5, x_label, "label middle"))
        parts.append(text(2, 10, y_label, "label"))
        axis = Markup('<path class="axis" d="M{} {} H{}"/>')
        parts.append(axis.format(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT))
        return Markup("").join(parts)


def _padded_range(values: Sequence[float], log: bool, pad: float) -> Range:
    low, high = min(values), max(values)
    if log:
        factor = max((high / low) ** pad, 1.05)
        return low / factor, high * factor
    space = (high - low) * pad or abs(high) * 0.05 or 1.0
    return low - space, high + space


def _fraction(value: float, bounds: Range, log: bool) -> float:
    low, high = bounds
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return min(max((value - low) / (high - low), 0), 1)


def _ticks_of(bounds: Range, log: bool) -> list[float]:
    return log_ticks(*bounds) if log else ticks(*bounds)


# Marks


def polyline(points: Sequence[Point]) -> str:
    """The `d` of a path through points of the drawing."""
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def dot(x: float, y: float, colour: str, title: str, radius: float) -> Markup:
    circle = '<circle class="dot k-{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>'
    return Markup(circle).format(colour, x, y, radius, title)


def bar(style: str, x: float, y: float, width: float, height: float, title: str) -> Markup:
    rectangle = (
        '<rect class="bar k-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
        "<title>{}</title></rect>"
    )
    return Markup(rectangle).format(style, x, y, width, height, title)


def text(x: float, y: float, words: object, style: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, words)


def dot_box(point: Point) -> Box:
    """The space that a dot takes, for `label_beside`."""
    x, y = point
    return x - 5, y - 5, x + 5, y + 5


def label_beside(x: float, y: float, words: str, colour: str, taken: list[Box]) -> Markup:
    """A label beside its point, where it meets no dot and no label drawn before.

    taken: boxes of the dots and labels so far. The label's own is added. A line leads from the
    point to a label that had to move up or down.
    """
    width, height = CHARACTER * len(words), 11

    def box(shift: float, side: int) -> Box:
        left = x + 8 if side > 0 else x - 8 - width
        return left, y + shift - height / 2, left + width, y + shift + height / 2

    shifts = sorted(range(-66, 67, 6), key=abs)
    candidates = itertools.product(shifts, (1, -1))
    free = ((shift, side) for shift, side in candidates if _is_free(box(shift, side), taken))
    fits_right = x + 8 + width <= WIDTH
    shift, side = next(free, (0, 1 if fits_right else -1))
    taken.append(box(shift, side))
    anchor = " end" if side < 0 else ""
    label = text(x + 8 * side, y + shift + 3.5, words, f"name k-{colour}{anchor}")
    if not shift:
        return label
    lead = Markup('<path class="rail" d="M{:.1f} {:.1f} L{:.1f} {:.1f}"/>')
    return lead.format(x, y, x + 7 * side, y + shift) + label


def _is_free(box: Box, taken: Iterable[Box]) -> bool:
    left, top, right, bottom = box
    inside = left >= LEFT and right <= WIDTH and top >= TOP and bottom <= HEIGHT - BOTTOM
    return inside and not any(_overlap(box, other) for other in taken)


def _overlap(one: Box, two: Box) -> bool:
    apart = one[2] < two[0] or one[0] > two[2] or one[3] < two[1] or one[1] > two[3]
    return not apart


def drawing(
    parts: Iterable[Markup],
    title: str,
    width: int = WIDTH,
    height: int = HEIGHT,
    style: str = "plot",
) -> Markup:
    """The <svg> element around its parts."""
    element = '<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    return Markup(element).format(style, width, height, escape(title), Markup("").join(parts))
