"""Learning curves: training loss and top-1 on val over the examples that a network saw."""

from __future__ import annotations

from collections.abc import Mapping

from networks import regular
from pipeline.choices import CONTROL_ROWS
from pipeline.controls import evaluated_controls, twins
from pipeline.files import damaged
from pipeline.graph import RunDirectory
from pipeline.store import Stage

from . import plots, tables
from .formatting import Plot, colours_of
from .svg import whole_percent

MOST_CURVES = 5

Curves = dict[str, list[tuple[float, float]]]  # "loss", "val/top1", ... -> (x, y)


def learning_curves(run: RunDirectory) -> list[Plot]:
    """Plots of the networks for all classes, and of specialists or members."""
    networks = _networks_for_all_classes(run)
    title = "The generalist, controls and students"
    drawn = _family_plots(title, networks, colours_of(networks))
    title, parts = _parts(run)
    colours = {name: f"curve{index}" for index, name in enumerate(parts)}
    return drawn + _family_plots(title, parts, colours)


def _networks_for_all_classes(run: RunDirectory) -> dict[str, Curves]:
    generalist = over_examples(read_metrics(run.generalist))

    def continued(stage: Stage, student: str | None = None) -> Curves:
        if student and run.config.students[student].start == "scratch":
            return over_examples(read_metrics(stage))
        return over_examples(read_metrics(stage), before=generalist)

    networks = {"generalist": generalist}
    twin_of = twins(run.config)  # which start as their students do
    for name, stage in evaluated_controls(run).items():
        row = CONTROL_ROWS.get(name)
        if row is not None and not row.goes_on:  # from scratch, or nothing that trains
            networks[name] = over_examples(read_metrics(stage))
        else:
            networks[name] = continued(stage, twin_of.get(name))
    for name, stage in run.students.items():
        networks[f"student {name}"] = continued(stage, name)
    return networks


def _parts(run: RunDirectory) -> tuple[str, dict[str, Curves]]:
    """A title, and the curves of a few specialists, or of a few members of the ensemble."""
    if not run.config.has_specialists:
        kind, stages = "member", [run.generalist, *run.members]
    else:
        kind, stages = "specialist", run.specialists
    done = [index for index, stage in enumerate(stages) if read_metrics(stage)]
    few = tables.spread(done, MOST_CURVES)
    curves = {f"{kind} {index}": over_examples(read_metrics(stages[index])) for index in few}
    if len(curves) == len(done):
        return f"The {kind}s", curves
    return f"{len(curves)} of {len(done)} {kind}s", curves


def _family_plots(
    title: str, networks: Mapping[str, Curves], colours: Mapping[str, str]
) -> list[Plot]:
    """Training loss and val top-1 of some networks, as far as in any."""

    def series(key: str) -> list[plots.Series]:
        return [
            plots.Series(name, colours[name], tables.curve(curves[key]), is_twin(name))
            for name, curves in networks.items()
            if curves.get(key)
        ]

    losses, top1 = series("loss"), series("val/top1")
    loss_plot = plots.lines(
        losses,
        "examples seen",
        "training loss, logarithmic",
        log_y=True,
        title=f"{title}: training loss",
    )
    top1_plot = plots.lines(
        top1,
        "examples seen",
        "val top-1",
        markers=True,
        y_text=whole_percent,
        title=f"{title}: val top-1",
    )
    drawn = [
        Plot(drawing, title, tuple((one.name, one.colour) for one in curves))
        for drawing, curves in ((loss_plot, losses), (top1_plot, top1))
    ]
    return [plot for plot in drawn if plot.svg]


def is_twin(name: str) -> bool:
    return name.endswith("_hard")


def read_metrics(stage: Stage | None) -> Curves:
    """metrics.jsonl as curves over steps. Of a step that was trained twice, the last."""
    if stage is None or stage.done() is None:
        return {}
    path = stage.path("metrics.jsonl")
    try:
        text = regular.read_text(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise damaged(path, str(error)) from None
    values: dict[str, dict[float, float]] = {}
    for line in text.splitlines():
        try:
            row = regular.parse(line)
        except ValueError:
            continue  # an attempt that was killed may have left half a line
        if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
            continue
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                values.setdefault(key, {})[row["step"]] = float(value)
    return {key: sorted(by_step.items()) for key, by_step in values.items()}


def over_examples(curves: Curves, before: Curves | None = None) -> Curves:
    """The curves over examples seen instead of steps.

    before: the curves of the network that this one started from. It begins at their end.
    """
    if not curves.get("examples"):
        return {}
    ends = [points[-1][0] for points in (before or {}).values()]
    start = max(ends, default=0)
    step, examples = curves["examples"][-1]
    moved = {
        key: [(start + x * examples / step, y) for x, y in points]
        for key, points in curves.items()
        if key != "examples"
    }
    # A copied or widened network computes the same function, so it starts with the same accuracy.
    if before and before.get("val/top1") and "val/top1" in moved:
        moved["val/top1"].insert(0, before["val/top1"][-1])
    return moved
