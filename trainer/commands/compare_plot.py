"""`python -m trainer compare`: what `referral compare` found, drawn."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

from pipeline.compare import METRICS, compare, read_runs, setting, words
from pipeline.config import UserError

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402


def draw(found: dict, path: Path) -> None:
    """A panel for each metric: every run a dot, mean and deviation over them.  Raises UserError if `path` cannot be
    written."""
    path = Path(path)
    metrics, variants = found["metrics"], [one["name"] for one in found["variants"]]
    names = list(dict.fromkeys(row["row"] for row in found["rows"]))
    across = min(len(metrics), 3)
    down = math.ceil(len(metrics) / across)
    height = 0.7 + len(names) * (0.1 + 0.17 * len(variants))
    canvas, panels = pyplot.subplots(
        down,
        across,
        figsize=(1.6 + 3.4 * across, 0.5 + down * height),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for panel in panels.flat[len(metrics) :]:
        panel.set_axis_off()
    for metric, panel in zip(metrics, panels.flat, strict=False):
        for row in found["rows"]:
            number, over = variants.index(row["variant"]), row["figures"][metric]
            # Variants of a row stand below each other, around the row's line.
            y = names.index(row["row"]) + 0.7 * ((number + 0.5) / len(variants) - 0.5)
            x = [
                METRICS[metric].scale * value
                for value in over["values"].values()
                if value is not None
            ]
            panel.scatter(x, [y] * len(x), s=16, color=f"C{number}", alpha=0.45, linewidths=0)
            if over["mean"] is not None:
                wide = METRICS[metric].scale * (over["deviation"] or 0)
                panel.errorbar(
                    METRICS[metric].scale * over["mean"],
                    y,
                    xerr=wide,
                    fmt="|",
                    markersize=11,
                    markeredgewidth=1.6,
                    color=f"C{number}",
                    linewidth=1.2,
                )
        if found["versus"]:
            panel.axvline(0, color="0.6", linewidth=0.8)
        panel.set_title(METRICS[metric].label, fontsize=10)
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.grid(axis="x", color="0.9")
        panel.tick_params(labelsize=8)
        panel.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    if len(variants) > 1:
        handles = [
            Line2D([], [], marker="o", markersize=4, color=f"C{i}") for i in range(len(variants))
        ]
        texts = [f"{one['name']}: {setting(one)}, n = {one['runs']}" for one in found["variants"]]
        canvas.legend(handles, texts, loc="outside lower left", fontsize=8, frameon=False)
    note = f"difference to {found['versus']} in the same run; " if found["versus"] else ""
    canvas.suptitle(
        f"{note}{len(found['runs'])} runs: each a dot; mean ± sample deviation",
        fontsize=9,
        color="0.35",
        x=0.01,
        ha="left",
    )
    try:
        canvas.savefig(path, dpi=150)
    except ValueError as mistake:
        raise UserError(f"--plot {path}: {mistake}") from None
    except OSError as mistake:
        raise UserError(f"--plot {path}: cannot be written: {mistake.strerror}") from None
    finally:
        pyplot.close(canvas)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="trainer compare", description="Draw finished runs beside each other."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--plot", required=True, type=Path, metavar="FILE.png")
    parser.add_argument("--metric", default="", metavar="NAME,...")
    parser.add_argument("--by", default="", metavar="KEY,...")
    parser.add_argument("--versus", metavar="ROW")
    args = parser.parse_args(argv)
    draw(compare(read_runs(args.runs), words(args.metric), words(args.by), args.versus), args.plot)
    return 0
