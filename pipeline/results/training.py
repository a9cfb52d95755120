"""What a training left in its summary.json, as a person reads it."""

from __future__ import annotations

from pathlib import Path

from ..files import read_json
from .formats import percent


def val_text(directory: Path) -> str:
    """`val top-1 76.1 %` of a training that ended in a directory. "" where it measured none."""
    top1 = val_top1(directory)
    return "" if top1 is None else f"val top-1 {percent(top1, 1)}"


def val_top1(directory: Path) -> float | None:
    try:
        summary = read_json(directory / "summary.json")
    except (OSError, ValueError):
        return None
    val = summary.get("val") if isinstance(summary, dict) else None
    return val.get("top1") if isinstance(val, dict) else None
