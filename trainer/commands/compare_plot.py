"""`python -P -m trainer compare`: what `referral compare` found, drawn."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.compare import METRICS, Comparison, compare, read_runs, setting, words
from pipeline.config import UserError
from pipeline.failures import cannot_write
from pipeline.usage import Parser

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

MOST_ACROSS = 3


def main(argv: list[str]) -> int:
    parser = Parser("python -P -m trainer compare", "Draw finished runs beside each other.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--plot", required=True, type=Path, metavar="FILE.png")
    parser.add_argument("--metric", default="", metavar="NAME,...")
    parser.add_argument("--by", default="", metavar="KEY,...")
    parser.add_argument("--versus", metavar="ROW")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs)
    draw(compare(runs, words(args.metric), words(args.by), args.versus), args.plot)
    return 0


def draw(comparison: Comparison, path: Path) -> None:
    """A panel for each metric: every run a dot, mean and deviation over them.

    Raises UserError if `path` cannot be written.
    """
    path = Path(path)
    names = list(dict.fromkeys(row["row"] for row in comparison["rows"]))
    figure, panels = _empty_panels(len(comparison["metrics"]), len(names), comparison)
    for metric, panel in zip(comparison["metrics"], panels, strict=True):
        _draw_metric(panel, comparison, metric, names)
        _style(panel, METRICS[metric].label, names)
    _add_texts(figure, comparison)
    if path.is_dir() or not path.suffix:
        raise UserError(f"--plot {path}: name a file with an extension, such as {path}/runs.png")
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UserError(f"--plot {path}: {error}") from None
    except OSError as error:
        raise cannot_write(path, error, option="--plot") from None
    finally:
        pyplot.close(figure)


def _empty_panels(count: int, rows: int, comparison: Comparison) -> tuple[Figure, list[Axes]]:
    across = min(count, MOST_ACROSS)
    down = math.ceil(count / across)
    height = 0.7 + rows * (0.1 + 0.17 * len(comparison["variants"]))
    figure, panels = pyplot.subplots(
        down,
        across,
        figsize=(1.6 + 3.4 * across, 0.5 + down * height),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for panel in panels.flat[count:]:
        panel.set_axis_off()
    return figure, list(panels.flat[:count])


def _draw_metric(panel: Axes, comparison: Comparison, metric: str, names: list[str]) -> None:
    variants = [variant["name"] for variant in comparison["variants"]]
    scale = METRICS[metric].scale
    for row in comparison["rows"]:
        index = variants.index(row["variant"])
        colour = f"C{index}"
        # Variants of a row stand below each other, around the row's line.
        y = names.index(row["row"]) + 0.7 * ((index + 0.5) / len(variants) - 0.5)
        moments = row["figures"][metric]
        x = [scale * value for value in moments["values"].values() if value is not None]
        panel.scatter(x, [y] * len(x), s=16, color=colour, alpha=0.45, linewidths=0)
        if moments["mean"] is not None:
            panel.errorbar(
                scale * moments["mean"],
                y,
                xerr=scale * (moments["deviation"] or 0),
                fmt="|",
                markersize=11,
                markeredgewidth=1.6,
                color=colour,
                linewidth=1.2,
            )
    if comparison["versus"]:
        panel.axvline(0, color="0.6", linewidth=0.8)


def _style(panel: Axes, title: str, names: list[str]) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.grid(axis="x", color="0.9")
    panel.tick_params(labelsize=8)
    panel.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _add_texts(figure: Figure, comparison: Comparison) -> None:
    """A legend of the variants, and what the dots are."""
    variants = comparison["variants"]
    if len(variants) > 1:
        handles = [
            Line2D([], [], marker="o", markersize=4, color=f"C{index}")
            for index in range(len(variants))
        ]
        labels = [
            f"{variant['name']}: {setting(variant)}, n = {variant['runs']}" for variant in variants
        ]
        figure.legend(handles, labels, loc="outside lower left", fontsize=8, frameon=False)
    note = ""
    if comparison["versus"]:
        note = f"difference to {comparison['versus']} in the same run; "
    figure.suptitle(
        f"{note}{len(comparison['runs'])} runs: each a dot; mean ± sample deviation",
        fontsize=9,
        color="0.35",
        x=0.01,
        ha="left",
    )
