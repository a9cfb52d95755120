"""Plots as inline SVG: small pure functions of numbers. `svg` has the marks and the axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from . import svg
from .formatting import signed
from .svg import Frame, short, whole_percent

# Examples: the accuracy of a bin that holds fewer says little, and its bar is drawn pale.
FEWEST = 20
ASIDE = 9  # units between values of one cost


@dataclass(frozen=True)
class Series:
    """A named curve. colour: the CSS class k-COLOUR."""

    name: str
    colour: str
    points: Sequence[svg.Point]
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A named point. label: a text beside it, or none."""

    name: str
    colour: str
    x: float
    y: float
    label: str = ""


def lines(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    markers: bool = False,
    y_text: Callable[[float], str] = short,
    x_ticks: Sequence[tuple[float, object]] | None = None,
    title: str = "",
) -> Markup:
    """Curves over a common x. Empty where there is no point to draw."""
    curves = [_drawable(one, log_y) for one in series]
    points = [point for curve in curves for point in curve.points]
    if not points:
        return Markup("")
    frame = Frame(points, log_y=log_y)
    parts = [frame.axes(x_label, y_label, short, y_text, x_ticks)]
    for curve in curves:
        located = [frame.locate(x, y) for x, y in curve.points]
        if not located:
            continue
        dashes = " dashed" if curve.dashed else ""
        path = Markup('<path class="{}" d="{}"><title>{}</title></path>')
        parts.append(
            path.format(f"line k-{curve.colour}{dashes}", svg.polyline(located), curve.name)
        )
        if (markers and len(located) <= 15) or len(located) == 1:
            parts += [svg.dot(x, y, curve.colour, curve.name, 3) for x, y in located]
    return svg.drawing(parts, title or f"{y_label} over {x_label}")


def _drawable(series: Series, log_y: bool) -> Series:
    if not log_y:
        return series
    positive = [(x, y) for x, y in series.points if y > 0]
    return Series(series.name, series.colour, positive, series.dashed)


def scatter(
    dots: Sequence[Dot],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    y_text: Callable[[float], str] = short,
    diagonal: bool = False,
    title: str = "",
) -> Markup:
    """Named points. Empty where there is none to draw."""
    dots = [dot for dot in dots if not log_x or dot.x > 0]
    if not dots:
        return Markup("")
    frame = Frame([(dot.x, dot.y) for dot in dots], log_x=log_x, pad=0.1)
    parts = [frame.axes(x_label, y_label, short, y_text)]
    if diagonal:
        parts.append(_diagonal(frame))
    located = [frame.locate(dot.x, dot.y) for dot in dots]
    taken = [svg.dot_box(point) for point in located]
    for dot, (x, y) in zip(dots, located, strict=True):
        parts.append(svg.dot(x, y, dot.colour, dot.name, 5 if dot.label else 3.5))
        if dot.label:
            parts.append(svg.label_beside(x, y, dot.label, dot.colour, taken))
    return svg.drawing(parts, title or f"{y_label} against {x_label}")


@dataclass(frozen=True)
class Estimate:
    """A named value and its interval at a cost x.

    style: "dot", "hollow" of what was measured instead, or "ringed" of the one that counts.
    """

    name: str
    colour: str
    x: float
    y: float
    low: float
    high: float
    label: str = ""
    style: str = "dot"


def estimates(
    values: Sequence[Estimate],
    front: Sequence[str],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    title: str = "",
) -> Markup:
    """Values with their intervals against their costs, and the front of those that nothing beats.

    front: names, from the cheapest up.  Values of one cost stand beside each other.
    """
    if not values:
        return Markup("")
    corners = [(one.x, y) for one in values for y in (one.low, one.y, one.high)]
    frame = Frame([*corners, (values[0].x, 0.0)], log_x=log_x, pad=0.08)
    parts = [frame.axes(x_label, y_label, short, _signed), _zero(frame)]
    located = _side_by_side(values, frame)
    steps = [located[i] for name in front for i in _dots_called(values, name)]
    if len(steps) > 1:
        path = Markup('<path class="line front k-ensemble" d="{}"/>')
        parts.append(path.format(_staircase(steps)))
    spans = [(frame.locate(one.x, one.high)[1], frame.locate(one.x, one.low)[1]) for one in values]
    taken = [svg.dot_box(point) for point in located]
    taken += [(x - 3, top, x + 3, end) for (x, _), (top, end) in zip(located, spans, strict=True)]
    for one, (x, _), span in zip(values, located, spans, strict=True):
        parts.append(_whisker(one, x, *span))
    for one, (x, y) in zip(values, located, strict=True):
        if one.label:
            parts.append(svg.label_beside(x, y, one.label, one.colour, taken))
    for one, (x, y) in zip(values, located, strict=True):
        parts.append(_estimate_dot(one, x, y))
    return svg.drawing(parts, title or f"{y_label} against {x_label}")


def _signed(value: float) -> str:
    return signed(value, 0 if value == round(value) else 1)


def _zero(frame: Frame) -> Markup:
    left, y = frame.locate(frame.x_range[0], 0.0)
    right, _ = frame.locate(frame.x_range[1], 0.0)
    return Markup('<path class="diagonal" d="M{:.1f} {:.1f} H{:.1f}"/>').format(left, y, right)


def _dots_called(values: Sequence[Estimate], name: str) -> list[int]:
    return [i for i, one in enumerate(values) if one.name == name and one.style != "hollow"]


def _side_by_side(values: Sequence[Estimate], frame: Frame) -> list[svg.Point]:
    """Where each value is drawn: those that would cover each other move aside."""
    located = [frame.locate(one.x, one.y) for one in values]
    rows: list[list[int]] = []
    for i in sorted(range(len(values)), key=lambda i: (located[i][0], -located[i][1])):
        if rows and located[i][0] - located[rows[-1][0]][0] < ASIDE:
            rows[-1].append(i)
        else:
            rows.append([i])
    for row in rows:
        middle = sum(located[i][0] for i in row) / len(row)
        for place, i in enumerate(row):
            located[i] = (middle + ASIDE * (place - (len(row) - 1) / 2), located[i][1])
    return located


def _staircase(points: Sequence[svg.Point]) -> str:
    """The `d` of a path from point to point: along, then up."""
    (x, y), *others = points
    return f"M{x:.1f} {y:.1f}" + "".join(f" H{x:.1f} V{y:.1f}" for x, y in others)


def _whisker(one: Estimate, x: float, top: float, bottom: float) -> Markup:
    path = Markup('<path class="whisker k-{}" d="M{:.1f} {:.1f} V{:.1f}"/>')
    return path.format(one.colour, x, top, bottom)


def _estimate_dot(one: Estimate, x: float, y: float) -> Markup:
    words = f"{one.name}: {signed(one.y, 1)} ({signed(one.low, 1)} to {signed(one.high, 1)})"
    if one.style == "hollow":
        return svg.dot(x, y, f"{one.colour} hollow", words, 4)
    if one.style == "ringed":
        ring = Markup('<circle class="ring k-{}" cx="{:.1f}" cy="{:.1f}" r="6.5"/>')
        return ring.format(one.colour, x, y) + svg.dot(x, y, one.colour, words, 4)
    return svg.dot(x, y, one.colour, words, 4.5)


def _diagonal(frame: Frame) -> Markup:
    """The line x = y, as far as the frame shows it."""
    low = max(frame.x_range[0], frame.y_range[0])
    high = min(frame.x_range[1], frame.y_range[1])
    if low >= high:
        return Markup("")
    path = Markup('<path class="diagonal" d="M{:.1f} {:.1f} L{:.1f} {:.1f}"/>')
    return path.format(*frame.locate(low, low), *frame.locate(high, high))


def equivalents(
    sizes: Sequence[tuple[int, float]], dots: Sequence[Dot], x_label: str, y_label: str
) -> Markup:
    """A metric over the size of an ensemble, and networks at the size that equals them.

    sizes: (size, metric). dots: x is the equivalent size. inf stands for "beyond the largest".
    """
    largest = max(size for size, _ in sizes)
    edge = largest + max(0.12 * largest, 0.4)  # where what lies beyond is drawn
    spots = [(min(dot.x, edge), dot.y) for dot in dots]
    frame = Frame([*sizes, *spots, (edge, sizes[-1][1])], pad=0.1)
    x_ticks = [(value, str(value)) for value in _whole_sizes(sizes, largest)]
    parts = [frame.axes(x_label, y_label, short, short, x_ticks)]
    for (x, y), dot in zip(spots, dots, strict=True):
        parts.append(_lead(frame, x, y, dot))

    curve = [frame.locate(x, y) for x, y in sizes]
    path = Markup('<path class="line k-ensemble" d="{}"/>')
    parts.append(path.format(svg.polyline(curve)))
    for (size, value), (x, y) in zip(sizes, curve, strict=True):
        parts.append(svg.dot(x, y, "ensemble", f"{size} networks: {value:.4f}", 3))

    located = [frame.locate(x, y) for x, y in spots]
    taken = [svg.dot_box(point) for point in [*located, *curve]]
    for dot, (x, y) in zip(dots, located, strict=True):
        parts.append(svg.dot(x, y, dot.colour, dot.name, 5))
        parts.append(svg.label_beside(x, y, dot.label, dot.colour, taken))
    return svg.drawing(parts, f"{y_label} over {x_label}")


def _whole_sizes(sizes: Sequence[tuple[int, float]], largest: int) -> list[int]:
    if largest <= 8:
        return [size for size, _ in sizes]
    return sorted({max(round(value), 1) for value in svg.ticks(1, largest)} | {largest})


def _lead(frame: Frame, x: float, y: float, dot: Dot) -> Markup:
    """A dashed line from the y axis to the dot, and down to its size where it has one."""
    left, across = frame.locate(frame.x_range[0], y)
    right, bottom = frame.locate(x, frame.y_range[0])
    down = "" if math.isinf(dot.x) else f" V{bottom:.1f}"
    path = Markup('<path class="lead k-{}" d="{}"/>')
    return path.format(dot.colour, f"M{left:.1f} {across:.1f} H{right:.1f}{down}")


def reliability(bins: Sequence[dict], colour: str, title: str) -> Markup:
    """Accuracy against confidence. Below, a strip with the fraction of the examples in each bin.

    bins: dicts {lo, hi, count, confidence, accuracy}. Those of fewer than FEWEST examples are pale.
    """
    size, left, top = 150, 34, 8
    bottom = top + size
    total = sum(one["count"] for one in bins) or 1
    panel = Markup('<rect class="panel" x="{}" y="{}" width="{}" height="{}"/>')
    diagonal = Markup('<path class="diagonal" d="M{} {} L{} {}"/>')
    parts = [
        panel.format(left, top, size, size),
        diagonal.format(left, bottom, left + size, top),
    ]
    for value in (0, 0.5, 1):
        parts.append(
            svg.text(left - 5, top + size * (1 - value) + 3.5, f"{100 * value:.0f}", "tick end")
        )
        parts.append(
            svg.text(left + size * value, bottom + 50, f"{100 * value:.0f}", "tick middle")
        )
    circle = Markup('<circle class="dot k-{}{}" cx="{:.1f}" cy="{:.1f}" r="2.2"/>')
    for one in bins:
        if not one["count"]:
            continue
        x, width = left + size * one["lo"], size * (one["hi"] - one["lo"]) - 1
        height = size * one["accuracy"]
        examples = f"{one['count']:,} examples"
        words = (
            f"confidence {whole_percent(one['confidence'])}, "
            f"right {whole_percent(one['accuracy'])}, {examples}"
        )
        pale = " pale" if one["count"] < FEWEST else ""
        parts.append(svg.bar(f"{colour}{pale}", x, bottom - height, width, height, words))
        # The root, so that rare bins still show.
        drop = max(26 * math.sqrt(one["count"] / total), 0.8)
        parts.append(svg.bar(f"{colour} faint", x, bottom + 6, width, drop, examples))
        parts.append(circle.format(colour, pale, left + size * one["confidence"], bottom - height))
    parts.append(svg.text(left + size / 2, bottom + 64, "confidence, %", "label middle"))
    return svg.drawing(parts, title, 195, 226)


def dumbbell(
    before: float, after: float, low: float, high: float, is_measurable: bool = True
) -> Markup:
    """One row: from before to after on the axis [low, high]. Gray where that may be chance."""
    width, height, pad = 150, 18, 6
    middle = height / 2

    def locate(value: float) -> float:
        fraction = (value - low) / (high - low) if high > low else 0.5
        return pad + (width - 2 * pad) * fraction

    start, end = locate(before), locate(after)
    colour = "good" if after >= before else "bad"
    if not is_measurable:
        colour = "chance"
    rail = Markup('<path class="rail" d="M{} {} L{} {}"/>')
    bridge = Markup('<path class="bridge k-{}" d="M{:.1f} {} L{:.1f} {}"/>')
    hollow = Markup('<circle class="dot hollow k-generalist" cx="{:.1f}" cy="{}" r="3.6"/>')
    filled = Markup('<circle class="dot k-{}" cx="{:.1f}" cy="{}" r="4.2"/>')
    parts = [
        rail.format(pad, middle, width - pad, middle),
        bridge.format(colour, start, middle, end, middle),
        hollow.format(start, middle),
        filled.format(colour, end, middle),
    ]
    title = f"{whole_percent(before)} before, {whole_percent(after)} after"
    return svg.drawing(parts, title, width, height, "mini")
