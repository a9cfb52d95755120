"""Draw the figures of the concept pages as SVG: `python docs/figures.py` writes docs/pictures.

Each figure has a ground of its own, so that it reads alike on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"
INK, FAINT, PAPER = "#1f2933", "#7b8794", "#ffffff"
BLUE, GREEN, AMBER = "#2c6fbb", "#2f855a", "#b7791f"
TINTS = {BLUE: "#dbeafe", GREEN: "#d9f2e3", AMBER: "#fdf0d5", FAINT: "#eef1f4"}
FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="{FONT}" font-size="14" role="img">'
    )
    arrow = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{FAINT}"/></marker></defs>'
    )
    ground = f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>'
    return "\n".join([head, f"<title>{title}</title>", arrow, ground, *parts, "</svg>", ""])


def text(x: float, y: float, words: str, colour: str = INK, size: int = 14, at: str = "middle"):
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    look = f'fill="{colour}" font-size="{size}" text-anchor="{at}"'
    return f'<text x="{x:g}" y="{y:g}" {look}>{words}</text>'


def box(x: float, y: float, width: float, height: float, lines: list[str], colour: str = BLUE):
    """A box with its lines in the middle. The first is the name, the others say what it is."""
    parts = [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
        f'fill="{TINTS[colour]}" stroke="{colour}"/>'
    ]
    top = y + height / 2 - 9 * (len(lines) - 1) + 5
    for number, line in enumerate(lines):
        shade, size = (INK, 14) if number == 0 else (INK, 12)
        parts.append(text(x + width / 2, top + 18 * number, line, shade, size))
    return "\n".join(parts)


def arrow(*points: tuple[float, float]) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{FAINT}" stroke-width="1.5" '
        'marker-end="url(#tip)"/>'
    )


def pipeline() -> str:
    parts = [
        box(20, 90, 100, 50, ["shards"], FAINT),
        box(160, 90, 120, 50, ["generalist", "all classes"]),
        box(320, 90, 120, 50, ["groups", "confusable classes"], AMBER),
        box(480, 90, 120, 50, ["specialists", "jobs side by side"], GREEN),
        box(640, 90, 120, 50, ["ensemble", "eq. 5"]),
        box(640, 200, 120, 50, ["student", "one network"], GREEN),
        box(160, 200, 120, 50, ["advise", "small pilots"], AMBER),
        box(320, 200, 140, 50, ["controls", "of equal cost"], FAINT),
        box(500, 20, 260, 40, ["report.html, results.json"], FAINT),
        arrow((120, 115), (158, 115)),
        arrow((280, 115), (318, 115)),
        arrow((440, 115), (478, 115)),
        arrow((600, 115), (638, 115)),
        arrow((700, 140), (700, 198)),
        arrow((220, 140), (220, 198)),
        arrow((700, 90), (700, 62)),
        arrow((760, 225), (785, 225), (785, 40), (762, 40)),
        arrow((390, 250), (390, 270), (795, 270), (795, 32), (762, 32)),
    ]
    return drawing(810, 285, "The stages of a run", parts)


def generalist_to_student() -> str:
    parts = [
        box(20, 95, 130, 60, ["generalist", "C classes"]),
        text(235, 40, "classes that it confuses", FAINT, 12),
        box(200, 55, 70, 40, ["c g q"], AMBER),
        box(200, 105, 70, 40, ["l 1 I"], AMBER),
        box(200, 155, 70, 40, ["0 o O"], AMBER),
        text(235, 222, "groups", INK, 14),
        box(330, 55, 130, 40, ["specialist 0"], GREEN),
        box(330, 105, 130, 40, ["specialist 1"], GREEN),
        box(330, 155, 130, 40, ["specialist 2"], GREEN),
        text(395, 222, "each starts as the generalist", FAINT, 12),
        box(520, 95, 120, 60, ["ensemble", "eq. 5"]),
        box(700, 95, 110, 60, ["student", "one network"], GREEN),
        arrow((150, 125), (168, 125), (168, 75), (198, 75)),
        arrow((150, 125), (198, 125)),
        arrow((150, 125), (168, 125), (168, 175), (198, 175)),
        *(arrow((270, y), (328, y)) for y in (75, 125, 175)),
        arrow((460, 75), (490, 75), (490, 110), (518, 110)),
        arrow((460, 125), (518, 125)),
        arrow((460, 175), (490, 175), (490, 140), (518, 140)),
        arrow((85, 155), (85, 245), (580, 245), (580, 157)),
        arrow((640, 125), (698, 125)),
        text(670, 115, "teaches", FAINT, 12),
    ]
    return drawing(830, 265, "From generalist to student", parts)


def bars(x: float, title: str, values: list[tuple[str, float]], colour: str) -> list[str]:
    """Upright bars of probabilities, the class below each and the value above."""
    parts = [text(x + 27 * len(values), 28, title)]
    for number, (name, value) in enumerate(values):
        left, height = x + 54 * number, 200 * value
        parts.append(
            f'<rect x="{left + 8:g}" y="{180 - height:g}" width="38" height="{height:g}" '
            f'fill="{TINTS[colour]}" stroke="{colour}"/>'
        )
        parts.append(text(left + 27, 174 - height, f"{value:.2f}".lstrip("0"), INK, 12))
        parts.append(text(left + 27, 198, name, FAINT, 12))
    return parts


def eq5() -> str:
    general = [("a", 0.4), ("b", 0.3), ("c", 0.2), ("d", 0.1)]
    special = [("a", 0.6), ("b", 0.2), ("none", 0.2)]
    joined = [("a", 1 / 2), ("b", 1 / 4), ("c", 1 / 6), ("d", 1 / 12)]
    parts = [
        *bars(20, "generalist g", general, BLUE),
        *bars(276, "specialist p, group {a, b}", special, GREEN),
        *bars(500, "answer q", joined, AMBER),
        text(257, 110, "+", FAINT, 22),
        text(470, 110, "→", FAINT, 22),
    ]
    return drawing(740, 215, "Eq. 5 with one specialist", parts)


def branches() -> str:
    parts = [
        box(20, 70, 90, 50, ["input"], FAINT),
        box(150, 70, 150, 50, ["trunk", "shared, runs once"]),
        box(360, 20, 170, 50, ["generalist's head", "C rows"]),
        box(360, 110, 170, 60, ["branch m", "|group| + 1 rows,", "trained alone"], GREEN),
        box(600, 65, 190, 60, ["logits + correction", "then eq. 5"], AMBER),
        arrow((110, 95), (148, 95)),
        arrow((300, 95), (330, 95), (330, 45), (358, 45)),
        arrow((300, 95), (330, 95), (330, 140), (358, 140)),
        arrow((530, 45), (565, 45), (565, 85), (598, 85)),
        arrow((530, 140), (565, 140), (565, 105), (598, 105)),
    ]
    return drawing(810, 190, "A branch corrects the generalist's logits", parts)


def second_opinions() -> str:
    parts = [
        box(20, 75, 80, 50, ["input"], FAINT),
        box(150, 25, 170, 50, ["generalist", "all C classes"]),
        box(370, 25, 170, 50, ["shortlist S", "its k likeliest classes"], AMBER),
        box(150, 125, 170, 50, ["second network", "another seed"], GREEN),
        box(370, 125, 170, 50, ["its opinion on S", "k rows of its head"], GREEN),
        box(600, 65, 190, 70, ["answer", "in S: a mean of both", "outside: the generalist"]),
        arrow((100, 100), (125, 100), (125, 50), (148, 50)),
        arrow((100, 100), (125, 100), (125, 150), (148, 150)),
        arrow((320, 50), (368, 50)),
        arrow((320, 150), (368, 150)),
        arrow((455, 75), (455, 123)),
        arrow((540, 50), (570, 50), (570, 90), (598, 90)),
        arrow((540, 150), (570, 150), (570, 115), (598, 115)),
    ]
    return drawing(810, 200, "A second opinion on a shortlist", parts)


# docs/demo.md, "With advice and its controls": predicted, its interval, measured
GAINS: list[tuple[str, float, float, float, float | None]] = [
    ("shortlist (advised)", 3.3, 1.2, 6.5, 4.5),
    ("average", 2.6, 0.8, 5.4, 3.5),
    ("copies", 2.1, -0.7, 4.9, 1.9),
    ("wider", 3.6, -0.1, 11.4, None),
    ("rerank", 2.4, 0.7, 4.9, None),
    ("average_student", 1.0, -1.5, 3.3, None),
    ("train_on", 0.9, -1.7, 3.2, None),
    ("branches", 0.3, -1.5, 2.0, None),
]


def advise() -> str:
    def at(points: float) -> float:
        return 250 + 40 * points

    bottom = 60 + 30 * len(GAINS)
    parts = [
        f'<line x1="{at(tick):g}" y1="45" x2="{at(tick):g}" y2="{bottom - 15}" '
        f'stroke="{FAINT}" stroke-opacity="{1 if tick == 0 else 0.25}"/>'
        for tick in range(-2, 13, 2)
    ]
    parts += [text(at(tick), bottom + 5, f"{tick:+d}", FAINT, 12) for tick in range(-2, 13, 2)]
    parts.append(text(250, 26, "gain in top-1, points", FAINT, 12, "start"))
    parts.append(f'<circle cx="470" cy="22" r="5" fill="{BLUE}"/>')
    parts.append(text(480, 26, "predicted on val, 90 %", INK, 12, "start"))
    parts.append(f'<rect x="624" y="17" width="10" height="10" fill="{AMBER}"/>')
    parts.append(text(640, 26, "measured on test", INK, 12, "start"))
    for number, (name, gain, low, high, measured) in enumerate(GAINS):
        y = 60 + 30 * number
        parts.append(text(160, y + 5, name, INK, 14, "end"))
        parts.append(
            f'<line x1="{at(low):g}" y1="{y}" x2="{at(high):g}" y2="{y}" stroke="{BLUE}" '
            'stroke-width="3" stroke-opacity=".45"/>'
        )
        parts.append(f'<circle cx="{at(gain):g}" cy="{y}" r="5" fill="{BLUE}"/>')
        if measured is not None:
            left = at(measured) - 5
            parts.append(f'<rect x="{left:g}" y="{y - 5}" width="10" height="10" fill="{AMBER}"/>')
    return drawing(770, bottom + 20, "Predicted and measured gains of the demo", parts)


FIGURES: dict[str, Callable[[], str]] = {
    "pipeline": pipeline,
    "generalist-to-student": generalist_to_student,
    "eq5": eq5,
    "branches": branches,
    "second-opinions": second_opinions,
    "advise": advise,
}


def main() -> None:
    for name, draw in FIGURES.items():
        (PICTURES / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
