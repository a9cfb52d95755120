"""advice.html: what pilots advise, in one file without script or request."""

from __future__ import annotations

from pipeline.advice.document import Advice
from pipeline.results import count, percent
from pipeline.results.formats import milliseconds

from .advice import advice_section
from .formatting import printable
from .overview import Tile
from .templates import template


def advice_html(advice: Advice) -> str:
    """The page of a run that is only advised so far.  advice: the content of advice.json."""
    page = template("advice_page.html.j2")
    section = advice_section(advice)
    return printable(page.render(advice=section, tiles=_tiles(advice)))


def _tiles(advice: Advice) -> list[Tile]:
    own = advice["generalist"]
    tiles = [
        Tile("the generalist's top-1 on val", percent(own["top1"]), f"NLL {own['nll']:.3f}"),
        Tile(
            "of its training was spent on pilots",
            percent(advice["spent"], 0),
            f"{percent(advice['budget'], 0)} allowed",
        ),
        Tile("steps of the generalist", count(own["steps"])),
    ]
    if own["multiplications"] is not None:
        latency = own["latency_ms"]
        note = "" if latency is None else f"{milliseconds(latency)} ms"
        tiles.append(Tile("multiplications of its answer", count(own["multiplications"]), note))
    return tiles
