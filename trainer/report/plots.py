"""Plots as inline SVG: small pure functions, every colour a CSS class, every text escaped.

A plot is drawn 360 units wide, about a phone's width in pixels, so that its text is readable there, larger elsewhere.
A series is {"name", "kind", "points": [(x, y)]}; `kind` chooses the colour (class k-KIND), "dashed" the stroke.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 24, 36
FEWEST = (
    20  # examples: the accuracy of a bin that holds fewer says little, and its bar is drawn pale
)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between low and high; powers alone over two decades, more below half a one."""
    if high / low < 4:
        return [value for value in ticks(low, high) if value > 0]
    factors = (1,) if high / low > 100 else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001
    ]


def short(value: float) -> str:
    """12k, 3.5M, 0.25: a number for an axis."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def whole_percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def lines(
    series: Sequence[dict],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    markers: bool = False,
    y_text: Callable = short,
    x_ticks: Sequence[tuple] | None = None,
    title: str = "",
) -> Markup:
    """Curves over a common x."""
    points = [point for one in series for point in one["points"] if not log_y or point[1] > 0]
    if not points:
        return Markup("")
    frame = _Frame(points, log_y=log_y)
    body = [frame.axes(x_label, y_label, short, y_text, x_ticks)]
    for one in series:
        drawn = [frame.place(x, y) for x, y in one["points"] if not log_y or y > 0]
        if not drawn:
            continue
        style = f"line k-{one['kind']}{' dashed' if one.get('dashed') else ''}"
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in drawn)
        body.append(
            Markup('<path class="{}" d="{}"><title>{}</title></path>').format(
                style, path, one["name"]
            )
        )
        if (markers and len(drawn) <= 15) or len(drawn) == 1:
            body.append(Markup("").join(_dot(x, y, one["kind"], one["name"], 3) for x, y in drawn))
    return _svg(body, title or f"{y_label} over {x_label}")


def scatter(
    points: Sequence[dict],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    y_text: Callable = short,
    diagonal: bool = False,
    title: str = "",
) -> Markup:
    """Named points {"name", "kind", "x", "y"}; those with a "label" carry it beside them."""
    points = [point for point in points if not log_x or point["x"] > 0]
    if not points:
        return Markup("")
    frame = _Frame([(point["x"], point["y"]) for point in points], log_x=log_x, pad=0.1)
    body = [frame.axes(x_label, y_label, short, y_text)]
    if diagonal:
        low, high = max(frame.x[0], frame.y[0]), min(frame.x[1], frame.y[1])
        if low < high:
            (x1, y1), (x2, y2) = frame.place(low, low), frame.place(high, high)
            body.append(
                Markup('<path class="diagonal" d="M{:.1f} {:.1f} L{:.1f} {:.1f}"/>').format(
                    x1, y1, x2, y2
                )
            )
    places = [frame.place(point["x"], point["y"]) for point in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for point, (x, y) in zip(points, places, strict=True):
        body.append(_dot(x, y, point["kind"], point["name"], 5 if point.get("label") else 3.5))
        if point.get("label"):
            body.append(_label(x, y, str(point["label"]), point["kind"], taken))
    return _svg(body, title or f"{y_label} against {x_label}")


def equivalents(
    sizes: Sequence[tuple], placed: Sequence[dict], x_label: str, y_label: str
) -> Markup:
    """A figure over the size of an ensemble, and others led to the size that equals them.

    sizes: (size, figure).  placed: named points as scatter's; x None stands for "beyond the largest".
    """
    largest = max(size for size, _ in sizes)
    edge = largest + max(0.12 * largest, 0.4)  # where what lies beyond is drawn
    spots = [(edge if one["x"] is None else one["x"], one["y"]) for one in placed]
    frame = _Frame([*sizes, *spots, (edge, sizes[-1][1])], pad=0.1)
    whole = (
        sorted({max(round(value), 1) for value in ticks(1, largest)} | {largest})
        if largest > 8
        else [size for size, _ in sizes]
    )
    body = [frame.axes(x_label, y_label, short, short, [(value, str(value)) for value in whole])]
    for (x, y), one in zip(spots, placed, strict=True):
        (left, across), (place, down) = frame.place(frame.x[0], y), frame.place(x, frame.y[0])
        lead = f"M{left:.1f} {across:.1f} H{place:.1f}" + (
            "" if one["x"] is None else f" V{down:.1f}"
        )
        body.append(Markup('<path class="lead k-{}" d="{}"/>').format(one["kind"], lead))
    drawn = [frame.place(x, y) for x, y in sizes]
    path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in drawn)
    body.append(Markup('<path class="line k-ensemble" d="{}"/>').format(path))
    said = [f"{size} networks: {value:.4f}" for size, value in sizes]
    body += [_dot(x, y, "ensemble", text, 3) for (x, y), text in zip(drawn, said, strict=True)]
    places = [frame.place(x, y) for x, y in spots]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in [*places, *drawn]]
    for (x, y), one in zip(places, placed, strict=True):
        body.append(_dot(x, y, one["kind"], one["name"], 5))
        body.append(_label(x, y, str(one["label"]), one["kind"], taken))
    return _svg(body, f"{y_label} over {x_label}")


def reliability(bins: Sequence[dict], kind: str, title: str) -> Markup:
    """Accuracy against confidence, pale where fewer than FEWEST examples stand behind it; the shares of the examples
    as a strip below."""
    size, left, top = 150, 34, 8
    total = sum(one["count"] for one in bins) or 1
    body = [
        Markup('<rect class="panel" x="{}" y="{}" width="{}" height="{}"/>').format(
            left, top, size, size
        ),
        Markup('<path class="diagonal" d="M{} {} L{} {}"/>').format(
            left, top + size, left + size, top
        ),
    ]
    for value in (0, 0.5, 1):
        body.append(
            _text(left - 5, top + size * (1 - value) + 3.5, f"{100 * value:.0f}", "tick end")
        )
        body.append(
            _text(left + size * value, top + size + 50, f"{100 * value:.0f}", "tick middle")
        )
    for one in bins:
        if not one["count"]:
            continue
        x, width = left + size * one["lo"], size * (one["hi"] - one["lo"]) - 1
        share, height = one["count"] / total, size * one["accuracy"]
        said = (
            f"confidence {whole_percent(one['confidence'])}, right {whole_percent(one['accuracy'])}, "
            f"{one['count']:,} examples"
        )
        pale = " pale" if one["count"] < FEWEST else ""
        body.append(_bar(f"{kind}{pale}", x, top + size - height, width, height, said))
        drop = max(26 * math.sqrt(share), 0.8)  # the root, so that rare bins still show
        body.append(
            _bar(f"{kind} faint", x, top + size + 6, width, drop, f"{one['count']:,} examples")
        )
        cx, cy = left + size * one["confidence"], top + size - height
        body.append(
            Markup('<circle class="dot k-{}{}" cx="{:.1f}" cy="{:.1f}" r="2.2"/>').format(
                kind, pale, cx, cy
            )
        )
    body.append(_text(left + size / 2, top + size + 64, "confidence, %", "label middle"))
    return _svg(body, title, 195, 226)


def dumbbell(before: float, after: float, low: float, high: float) -> Markup:
    """One row: from before to after on the axis [low, high]."""
    width, height, pad = 150, 18, 6

    def place(value):
        return pad + (width - 2 * pad) * ((value - low) / (high - low) if high > low else 0.5)

    a, b, kind = place(before), place(after), "good" if after >= before else "bad"
    body = [
        Markup('<path class="rail" d="M{} {} L{} {}"/>').format(
            pad, height / 2, width - pad, height / 2
        ),
        Markup('<path class="bridge k-{}" d="M{:.1f} {} L{:.1f} {}"/>').format(
            kind, a, height / 2, b, height / 2
        ),
        Markup('<circle class="dot hollow k-generalist" cx="{:.1f}" cy="{}" r="3.6"/>').format(
            a, height / 2
        ),
        Markup('<circle class="dot k-{}" cx="{:.1f}" cy="{}" r="4.2"/>').format(
            kind, b, height / 2
        ),
    ]
    return _svg(
        body, f"{whole_percent(before)} before, {whole_percent(after)} after", width, height, "mini"
    )


class _Frame:
    """Where a data point lies on the drawing."""

    def __init__(self, points, log_x=False, log_y=False, pad=0.04):
        self.log_x, self.log_y = log_x, log_y
        self.x = self._range([x for x, _ in points], log_x, pad)
        self.y = self._range([y for _, y in points], log_y, max(pad, 0.06))

    @staticmethod
    def _range(values, log, pad):
        low, high = min(values), max(values)
        if log:
            factor = max((high / low) ** pad, 1.05)
            return low / factor, high * factor
        space = (high - low) * pad or abs(high) * 0.05 or 1.0
        return low - space, high + space

    def place(self, x, y):
        across = self._share(x, self.x, self.log_x)
        up = self._share(y, self.y, self.log_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    @staticmethod
    def _share(value, bounds, log):
        low, high = bounds
        if log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return min(max((value - low) / (high - low), 0), 1)

    def axes(self, x_label, y_label, x_text, y_text, x_ticks=None) -> Markup:
        body = []
        for value in log_ticks(*self.y) if self.log_y else ticks(*self.y):
            _, y = self.place(self.x[0], value)
            body.append(
                Markup('<path class="grid" d="M{} {:.1f} H{}"/>').format(LEFT, y, WIDTH - RIGHT)
            )
            body.append(_text(LEFT - 6, y + 3.5, y_text(value), "tick end"))
        if x_ticks is None:
            x_ticks = [
                (value, x_text(value))
                for value in (log_ticks(*self.x) if self.log_x else ticks(*self.x))
            ]
        for value, text in x_ticks:
            x, _ = self.place(value, self.y[0])
            body.append(_text(x, HEIGHT - BOTTOM + 14, text, "tick middle"))
        body.append(_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 5, x_label, "label middle"))
        body.append(_text(2, 10, y_label, "label"))
        body.append(
            Markup('<path class="axis" d="M{} {} H{}"/>').format(
                LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT
            )
        )
        return Markup("").join(body)


def _label(x: float, y: float, text: str, kind: str, taken: list) -> Markup:
    """A label beside its point, where it meets no dot and no label drawn before; a line leads to one that had to move.

    taken: boxes (left, top, right, bottom), to which the label's own is added.
    """
    width, height = 7.0 * len(text), 11
    shifts = sorted(range(-66, 67, 6), key=abs)
    places = [(shift, side) for shift in shifts for side in (1, -1)]

    def box(place):
        shift, side = place
        start = x + 8 if side > 0 else x - 8 - width
        return start, y + shift - height / 2, start + width, y + shift + height / 2

    def free(place):
        left, top, right, bottom = box(place)
        inside = left >= LEFT and right <= WIDTH and top >= TOP and bottom <= HEIGHT - BOTTOM
        return inside and all(
            right < l or left > r or bottom < t or top > b for l, t, r, b in taken
        )

    shift, side = next(
        (place for place in places if free(place)), (0, 1 if x + 8 + width <= WIDTH else -1)
    )
    taken.append(box((shift, side)))
    words = _text(x + 8 * side, y + shift + 3.5, text, f"name k-{kind}{' end' if side < 0 else ''}")
    if not shift:
        return words
    lead = '<path class="rail" d="M{:.1f} {:.1f} L{:.1f} {:.1f}"/>'
    return Markup(lead).format(x, y, x + 7 * side, y + shift) + words


def _dot(x, y, kind, name, radius) -> Markup:
    return Markup(
        '<circle class="dot k-{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>'
    ).format(kind, x, y, radius, name)


def _bar(kind, x, y, width, height, said) -> Markup:
    return Markup(
        '<rect class="bar k-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
    ).format(kind, x, y, width, height, said)


def _text(x, y, text, style) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, text)


def _svg(body, title: str, width: int = WIDTH, height: int = HEIGHT, style: str = "plot") -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        style, width, height, escape(title), Markup("").join(body)
    )
