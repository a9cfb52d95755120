"""report.html: one self-contained file that shows what the run found, for whoever has only this file.

No script, no request: plots are inline SVG, pictures data: URIs, and a Content-Security-Policy forbids the rest.  Class
names are anybody's text: the template escapes everything that is not Markup, and only plots.py makes Markup.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import jinja2
import numpy as np
import tomli_w

from pipeline import results as figures
from pipeline.config import Ensemble, Student
from pipeline.graph import RunDirectory
from pipeline.store import Stage, read_json, write_json, write_text

from . import plots, tables
from .pictures import phrases, pictures, why_no_pictures

MOST_GROUPS, MOST_TILES, MOST_EXAMPLES, MOST_SPECIALISTS, MOST_CURVES = 24, 16, 12, 100, 5
MOST_SAID, MOST_PANELS, MOST_SIZES = 3, 8, 10
LONGEST_NAME = 80
KINDS = {
    "generalist": "generalist",
    "ensemble": "ensemble",
    "control_wall": "wall",
    "control_compute": "compute",
    "student_hard": "hard",
}
OTHER_COLOURS = 6
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def write_report(
    run: RunDirectory, directory: Path, images=None, class_counts: Sequence[int] | None = None
) -> dict:
    """Write results.json and report.html into `directory`; returns the results.

    images: the test split's ShardSet, for its pictures.  class_counts: [C], training examples of each class; absent,
    the manifest beside the train shards says, else the test labels stand in.  UserError if the run is not evaluated.
    """
    results = figures.collect(run)
    directory = Path(directory)
    write_json(directory / "results.json", results)
    write_text(directory / "report.html", render(run, results, images, class_counts))
    return results


def render(run: RunDirectory, results: dict, images=None, class_counts=None) -> str:
    """The page as text."""
    evidence = Evidence(run, results, images, class_counts)
    why_none = why_no_pictures(images)
    groups, examples = (
        None if evidence.is_deep else group_cards(evidence),
        changed_examples(evidence),
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=figures.percent,
        number=figures.number,
        count=figures.count,
        duration=figures.duration,
        points=_points,
        bytes=_bytes,
        flow=_flow,
    )
    page = environment.get_template("template.html.j2").render(
        verdict=figures.verdict(results),
        students_say=[figures.student_verdict(results, name) for name in told_students(results)]
        + [line for line in [figures.classes_line(results)] if line],
        wins=figures.wins(results),
        title=run.root.resolve().name,
        results=results,
        missing=evidence.missing,
        deep=evidence.is_deep,
        tiles=headline_tiles(results),
        rows=figure_rows(evidence),
        rows_explained=explanations(evidence),
        cost_plots=cost_plots(results),
        curves=learning_curves(run),
        captured=None if evidence.is_deep else captured_bars(evidence),
        groups=groups,
        specialists=None if evidence.is_deep else specialist_rows(evidence),
        forecast_plot=None if evidence.is_deep else forecast_plot(evidence),
        coverage=None if evidence.is_deep else evidence.coverage,
        deciles=frequency(evidence),
        calibration=calibration_rows(results),
        reliability=reliability_panels(evidence),
        diversity=diversity_table(results),
        sizes=size_rows(results),
        size_plot=size_plot(results),
        examples=examples,
        pictures=pictures(images, picture_rows(groups, examples), evidence.ids)
        if why_none is None
        else {},
        phrases=phrases(images, picture_rows(groups, examples), evidence.ids)
        if why_none is not None
        else {},
        why_no_pictures=why_none,
        names=evidence.names,
        facts=run_facts(evidence),
        stages=stage_times(run),
        config=tomli_w.dumps(run.config.dump()),
    )
    page = re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", page)
    # A lone surrogate cannot be written as UTF-8, and HTML has no NUL: class names may hold either.
    return (
        UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", page)
        .encode("utf-8", "replace")
        .decode("utf-8")
    )


class Evidence:
    """What the run left on disk, read once, absent parts as None."""

    def __init__(self, run: RunDirectory, results: dict, images=None, class_counts=None):
        self.run, self.results, self.images = run, results, images
        self.ensemble = figures.read_evaluation(run.evaluate, "ensemble")
        self.is_deep = run.config.is_deep
        self.missing = sorted(self.ensemble.get("missing") or [])
        self.clusters = {} if self.is_deep else figures.read_file(run.cluster, "summary.json") or {}
        self.skipped = self.clusters.get("skipped") or []
        found = {"members": []} if self.is_deep else figures.read_file(run.cluster, "groups.json")
        self.groups = [np.asarray(m, dtype=np.int64) for m in found["members"]]
        self._class_counts = class_counts

    def predictions(self, name: str) -> dict[str, np.ndarray] | None:
        try:
            with np.load(self.run.evaluate.path(f"{name}.npz"), allow_pickle=False) as file:
                return dict(file)
        except FileNotFoundError:
            return None

    @cached_property
    def before(self) -> dict[str, np.ndarray]:
        return self.predictions("generalist")

    @cached_property
    def after(self) -> dict[str, np.ndarray]:
        return self.predictions("ensemble")

    @property
    def labels(self) -> np.ndarray:
        return self.before["labels"]

    @property
    def ids(self) -> np.ndarray:
        """The test sample of each prediction: damaged ones have none."""
        return self.before["ids"]

    @cached_property
    def right(self) -> dict[str, np.ndarray]:
        """Name -> bool [n], for every row with predictions."""
        names = ["generalist", *self.results["controls"], "ensemble", *self.results["students"]]
        found = {name: self.predictions(name) for name in names}
        return {name: p["top5"][:, 0] == p["labels"] for name, p in found.items() if p is not None}

    @cached_property
    def names(self) -> list[str]:
        """A name for every class: the shards', else the model's, else its number."""
        known = self.class_names
        names = [str(name) if str(name).strip() else f"class {c}" for c, name in enumerate(known)]
        names += [f"class {c}" for c in range(len(names), self.num_classes)]
        return [
            name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in names
        ]

    @cached_property
    def class_names(self) -> list:
        known = list(getattr(self.images, "class_names", None) or [])
        return (
            known
            or (figures.read_file(self.run.generalist, "model.json") or {}).get("class_names")
            or []
        )

    @cached_property
    def num_classes(self) -> int:
        said = (
            None
            if self.is_deep
            else figures.read_file(self.run.cluster, "groups.json").get("num_classes")
        )
        largest = max([int(self.labels.max()), *(int(m.max()) for m in self.groups if len(m))])
        return int(said or max(largest + 1, len(self.class_names)))

    @cached_property
    def class_counts(self) -> tuple[np.ndarray, str]:
        """Examples of each class [C], and of which split."""
        if self._class_counts is not None:
            return np.asarray(self._class_counts), "training"
        counts = manifest_counts(self.run.config.data.train, self.num_classes)
        if counts is not None:
            return counts, "training"
        return np.bincount(self.labels, minlength=self.num_classes), "test"

    @cached_property
    def weights(self) -> dict[tuple[int, int], float]:
        return tables.confusion_weights(
            self.labels, self.before["top5"], self.before["top5_probability"]
        )

    @cached_property
    def coverage(self) -> list[dict]:
        absent = {*self.missing, *self.skipped}
        covering = tables.covering_specialists(self.groups, self.num_classes, absent)
        return tables.coverage_table(
            self.labels, self.right["generalist"], self.right["ensemble"], covering
        )

    @cached_property
    def specialist(self) -> dict[int, dict]:
        return {row["index"]: row for row in self.results.get("specialists", [])}

    def forecast(self, m: int) -> float | None:
        """Share of val examples that a perfect specialist m would put right."""
        foretold = self.clusters.get("forecast") or []
        one = foretold[m] if m < len(foretold) else None
        return one.get("gain") if isinstance(one, dict) else one

    def changes(self, m: int) -> tuple[int, int] | None:
        """Of the test examples routed to specialist m: how many the ensemble put right, how many it spoilt."""
        active = self.after.get("active")
        if active is None or m in (*self.missing, *self.skipped):
            return None
        asked, was, now = (
            active[:, m].astype(bool),
            self.right["generalist"],
            self.right["ensemble"],
        )
        return int((asked & now & ~was).sum()), int((asked & was & ~now).sum())


def manifest_counts(pattern: str, num_classes: int) -> np.ndarray | None:
    """Training examples of each class, from the manifest beside the shards: [C], or None where it does not say."""
    first = Path(pattern.split("::")[0])
    try:
        manifest = read_json((first if first.is_dir() else first.parent) / "manifest.json")
        shards = manifest["splits"]["train"]["shards"]
        number_of = {name: c for c, name in enumerate(manifest["classes"])}
        counts = np.zeros(num_classes, dtype=np.int64)
        for shard in shards:
            for key, n in shard["class_counts"].items():
                counts[number_of[key]] += n
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    return counts if counts.any() else None


def told_students(results: dict) -> list[str]:
    """The students that the head of the page speaks of: main, then the others in the config's order."""
    return sorted(results["students"], key=lambda name: name != "main")[:MOST_SAID]


def headline_tiles(results: dict) -> list[dict]:
    """The four figures that say most."""
    generalist, ensemble, clusters = (
        results["generalist"],
        results["ensemble"],
        results.get("clusters"),
    )
    before, after = figures.errors(generalist), figures.errors(ensemble)
    tiles = [
        {
            "what": "top-1 errors, generalist to ensemble",
            "from": f"{before:,}",
            "to": f"{after:,}",
            "note": f"{_signed(100 * (after - before) / before, 1)} %" if before else "",
        },
    ]
    if generalist["nll"] is not None and ensemble["nll"] is not None:
        change = ensemble["nll"] - generalist["nll"]
        tiles.append(
            {
                "what": "NLL, generalist to ensemble",
                "from": f"{generalist['nll']:.3f}",
                "to": f"{ensemble['nll']:.3f}",
                "note": _signed(change, 3),
            }
        )
    if results["student"] is not None:
        share = figures.share_of_gain(results["student"], results)
        tiles.append(
            {
                "what": "of the gain kept by one network, the student",
                "from": "",
                "to": "–" if share is None else figures.percent(share, 0),
                "note": f"{figures.percent(results['student']['top1'])} top-1",
            }
        )
    known = {
        name: row
        for name, row in results["students"].items()
        if "dee" in row or "dee_beyond" in row
    }
    if known:
        name = "main" if "main" in known else next(iter(known))
        tiles.append(
            {
                "what": f"networks of a deep ensemble have the calibrated NLL of the student {name} (DEE)",
                "from": "",
                "to": figures.worth(known[name], results),
                "note": f"of {len(results['sizes'])}",
            }
        )
    if clusters and clusters["captured_confusion"] is not None:
        chance = clusters["chance"]
        tiles.append(
            {
                "what": "of the generalist's test errors lie inside a group",
                "from": "",
                "to": figures.percent(clusters["captured_confusion"], 0),
                "note": f"{clusters['captured_confusion'] / chance:.1f} × chance" if chance else "",
            }
        )
    return tiles


COLUMNS = {
    "top1": ("top-1", "highest"),
    "top5": ("top-5", "highest"),
    "nll": ("NLL", "lowest"),
    "brier": ("Brier", "lowest"),
    "ece": ("ECE", "lowest"),
    "macro_top1": ("macro top-1", "highest"),
}


def figure_rows(evidence: Evidence) -> list[dict]:
    """The table of figures: cells with the best of each column marked, and the paired difference to the generalist."""
    named, rows = figures.named_rows(evidence.results), []
    kinds = kinds_of(named)
    best = {key: best_of(named, key, which) for key, (_, which) in COLUMNS.items()}
    for label, row in named.items():
        name = label.removeprefix("student ")
        right, versus = evidence.right.get(name), None
        if name != "generalist" and right is not None:
            versus = tables.paired_difference(evidence.right["generalist"], right)
        shown = (
            figures.percent,
            figures.percent,
            figures.number,
            figures.number,
            figures.number,
            figures.percent,
        )
        cells = [
            {"text": show(row[key]), "best": row[key] is not None and row[key] == best[key]}
            for key, show in zip(COLUMNS, shown, strict=True)
        ]
        share = (
            figures.share_of_gain(row, evidence.results) if label.startswith("student ") else None
        )
        rows.append(
            {
                "name": label,
                "kind": kinds[label],
                "cells": cells,
                "versus": versus,
                "cost": row["cost"],
                "errors": figures.errors(row),
                "share": share,
            }
        )
    return rows


def best_of(named: dict[str, dict], key: str, which: str = "lowest") -> float | None:
    """The best value of a column; where all are equal none is best."""
    values = [row[key] for row in named.values() if row.get(key) is not None]
    return (max if which == "highest" else min)(values) if len(set(values)) > 1 else None


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """The colour of each row, by its name in the table: the student main has its own, the others take turns."""
    found, others = {}, itertools.cycle(f"other{i}" for i in range(OTHER_COLOURS))
    for name in names:
        own = {"student main": "student"} | KINDS
        found[name] = own[name] if name in own else next(others)
    return found


def explanations(evidence: Evidence) -> list[dict]:
    """What each row is, with the numbers that make it fair or not."""
    run, config, results = evidence.run, evidence.run.config, evidence.results
    if evidence.is_deep:
        said = {
            "generalist": "One network for all classes, the first member of the ensemble.",
            "ensemble": f"{config.ensemble.members} networks, trained alike from different seeds, and the mean of "
            "their distributions (Lakshminarayanan et al. 2017).",
        }
    else:
        said = {
            "generalist": "One network for all classes. Everything else starts from its weights or its predictions.",
            "ensemble": f"The generalist and the specialists whose group holds {_gate(config.ensemble.gate)}, "
            "joined to one distribution by eq. 5 of Hinton et al. 2015.",
        }
    if "control_wall" in results["controls"]:
        rates, best = config.controls.learning_rates, figures.best_control_wall(run)
        chosen = f"; {rates[best]:.2g} was best" if best is not None else ""
        said["control_wall"] = (
            "The generalist trained on, without groups, for as many further examples as one specialist sees"
            f"{_seen(run, best)}: what the same wall-clock time would have given, where all specialists train side by "
            f"side. Of the peak rates {', '.join(f'{rate:.2g}' for rate in rates)} the one with the lowest loss "
            f"on the val split is shown{chosen}."
        )
    if "control_compute" in results["controls"]:
        said["control_compute"] = (
            "The generalist trained on, without groups, for as many further examples as all specialists saw together"
            f"{_seen(run, 'control_compute')}, at the same rate: what equal total compute does for a single network. "
            "Where the generalist is not yet converged this is the one hard to beat. The search for the rate is not "
            "charged."
        )
    if "student_hard" in results["controls"]:
        said["student_hard"] = (
            "The twin of the student main: the same network, start, steps and order of examples, but hard labels only. "
            "The difference between the two is what its teacher taught."
        )
    for name, student in config.students.items():
        if name not in results["students"]:
            continue
        said[f"student {name}"] = explain_student(student, config.ensemble)
    kinds = kinds_of(figures.named_rows(results))
    return [{"name": name, "kind": kinds[name], "text": text} for name, text in said.items()]


def explain_student(student: Student, ensemble: Ensemble) -> str:
    """What a student is, whom it learns from, and what it costs to ask."""
    size = ", ".join(f"{key} {value}" for key, value in student.model.items())
    size = f"with {size}" if size else "of the generalist’s size"
    what, price = f"One network {size}", "At inference it costs one forward pass."
    members = student.members or ensemble.members
    if student.network == "hydra":
        what = f"A Hydra {size}: one body, {members} heads"
        price = "At inference the body runs once, and every head."
    elif student.network == "batch_ensemble":
        what = f"A BatchEnsemble {size}: {members} members, which share all but rank-one factors of their weights"
        price = "At inference it costs a forward pass for each member."
    taught = {
        "hard": "hard labels",
        "prior": "labels, as a Prior Network: its answer is a distribution over distributions",
        "distill": f"{_whose(student.teacher)} distributions as targets",
    }[student.method]
    if student.method == "distill" and student.temperature != 1:
        matching = math.isinf(student.temperature)
        taught += (
            ", their logits matched" if matching else f" at temperature {student.temperature:g}"
        )
    if student.method == "distill" and student.hard_weight:
        taught += f" and the labels with weight {student.hard_weight:.2g}"
    own_teachers = (
        ensemble.kind == "deep" and student.teacher == "ensemble" and student.network != "single"
    )
    if student.method == "distill" and own_teachers:
        taught += ", each member from one of its own"
    if student.perturb != "none":
        taught += f", at inputs moved by {PERTURBATIONS[student.perturb]}"
    if student.share < 1:
        taught += f", with {figures.percent(student.share, 1)} of the training examples"
    if student.leave_out:
        taught += f", without examples of {len(student.leave_out)} class{'es' if len(student.leave_out) > 1 else ''}"
        taught += ", whose biases were then corrected on val" if student.bias_correction else ""
    starts = {"generalist": "as the generalist", "scratch": "from fresh weights"}
    start = starts.get(student.start, f"as the student {student.start}")
    return f"{what}, trained on {taught}, starting {start}. {price}"


PERTURBATIONS = {
    "gaussian": "Gaussian noise",
    "ods": "output diversified sampling",
    "conf_ods": "ConfODS",
}


def _whose(teacher: str) -> str:
    if "/" in teacher:
        return f"{Path(teacher).name}'s"
    return (
        f"the {teacher}'s" if teacher in ("ensemble", "generalist") else f"the student {teacher}'s"
    )


def _gate(n: int) -> str:
    return (
        "the generalist's most probable class"
        if n == 1
        else f"one of the generalist's {n} most probable classes"
    )


def _seen(run: RunDirectory, which: int | str | None) -> str:
    name = f"control_wall-{which}" if isinstance(which, int) else which
    summary = (
        figures.read_file(run.controls[name], "summary.json") if name in run.controls else None
    )
    if not summary or summary.get("examples_seen") is None:
        return ""
    return f" ({figures.count(summary['examples_seen'])})"


def cost_plots(results: dict) -> list[dict]:
    """Top-1 against what it cost to train: examples, and seconds."""
    found, kinds = [], kinds_of(figures.named_rows(results))
    for key, label, text in (
        ("examples_seen", "training examples seen", plots.short),
        ("seconds", "seconds of training", plots.short),
    ):
        points = [
            {
                "name": f"{name}: {figures.percent(row['top1'])}, {text(row['cost'][key])}",
                "kind": kinds[name],
                "label": name.removeprefix("student "),
                "x": row["cost"][key],
                "y": row["top1"],
            }
            for name, row in figures.named_rows(results).items()
            if row["cost"][key]
        ]
        spread = points and max(p["x"] for p in points) > 8 * min(p["x"] for p in points)
        drawing = plots.scatter(
            points, label, "top-1", log_x=bool(spread), y_text=plots.whole_percent
        )
        if drawing:
            found.append(
                {
                    "svg": drawing,
                    "caption": f"Top-1 against {label}{', logarithmic' if spread else ''}",
                }
            )
    return found


def read_metrics(stage: Stage | None) -> dict[str, list[tuple[float, float]]]:
    """metrics.jsonl as curves {"loss", "val/top1", "val/loss", ...} over steps; of a step trained twice the last."""
    if stage is None or stage.done() is None:
        return {}
    try:
        text = stage.path("metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    found: dict[str, dict[float, float]] = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # an attempt that was killed may have left half a line
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                found.setdefault(key, {})[row["step"]] = float(value)
    return {key: sorted(values.items()) for key, values in found.items()}


def learning_curves(run: RunDirectory) -> list[dict]:
    """Two families of curves, each as training loss and as val top-1: whole-label-set networks, and specialists or
    members."""
    base = over_examples(read_metrics(run.generalist))
    whole = {"generalist": base}
    best = figures.best_control_wall(run)
    if best is not None:
        whole["control_wall"] = over_examples(
            read_metrics(run.controls[f"control_wall-{best}"]), base
        )
    for name, stage in run.controls.items():
        if not name.startswith("control_wall-"):
            fresh = name == "student_hard" and run.config.students["main"].start == "scratch"
            whole[name] = over_examples(read_metrics(stage), None if fresh else base)
    for name, stage in run.students.items():
        fresh = run.config.students[name].start == "scratch"
        whole[f"student {name}"] = over_examples(read_metrics(stage), None if fresh else base)
    what = "member" if run.config.is_deep else "specialist"
    parts = dict(
        enumerate([run.generalist, *run.members] if run.config.is_deep else run.specialists)
    )
    done = [m for m, stage in parts.items() if read_metrics(stage)]
    few = {
        f"{what} {m}": over_examples(read_metrics(parts[m]))
        for m in tables.spread(done, MOST_CURVES)
    }
    several = f"The {what}s" if len(few) == len(done) else f"{len(few)} of {len(done)} {what}s"
    found, kinds = [], kinds_of(whole)
    for title, family in (("The generalist, controls and students", whole), (several, few)):
        for key, label in (("loss", "training loss"), ("val/top1", "val top-1")):
            series = [
                {
                    "name": name,
                    "kind": kinds[name] if family is whole else f"curve{index}",
                    "dashed": name == "student_hard",
                    "points": tables.curve(curves[key]),
                }
                for index, (name, curves) in enumerate(family.items())
                if curves.get(key)
            ]
            drawing = plots.lines(
                series,
                "examples seen",
                f"{label}, logarithmic" if key == "loss" else label,
                log_y=key == "loss",
                markers=key != "loss",
                y_text=plots.short if key == "loss" else plots.whole_percent,
                title=f"{title}: {label}",
            )
            if drawing:
                legend = [(one["name"], one["kind"]) for one in series]
                found.append({"svg": drawing, "caption": title, "legend": legend})
    return found


def over_examples(curves: dict, before: dict | None = None) -> dict[str, list[tuple[float, float]]]:
    """The same curves over examples seen; those of a network that goes on from `before` begin at its end."""
    start = max((points[-1][0] for points in (before or {}).values()), default=0)
    if not curves.get("examples"):
        return {}
    step, examples = curves.pop("examples")[-1]
    found = {
        key: [(start + x * examples / step, y) for x, y in points] for key, points in curves.items()
    }
    # What goes on from a network starts with its accuracy: copying and widening preserve the function.
    if before is not None and before.get("val/top1") and "val/top1" in found:
        found["val/top1"].insert(0, before["val/top1"][-1])
    return found


def captured_bars(evidence: Evidence) -> dict:
    """Captured confusion: measured on test and val errors, expected from predictions, and by chance."""
    clusters, summary = evidence.results["clusters"], evidence.clusters
    bars = [
        ("test errors inside a group", clusters["captured_confusion"], "ensemble"),
        ("chance: random groups of these sizes", clusters["chance"], "chance"),
        ("val errors inside a group", summary.get("captured"), "generalist"),
        (
            "expected on val without labels, from predictions alone",
            clusters["captured_unlabelled"],
            "generalist",
        ),
    ]
    sizes = clusters["sizes"] or [len(members) for members in evidence.groups]
    memberships = np.bincount(np.concatenate(evidence.groups), minlength=evidence.num_classes)
    return {
        "bars": [
            {"label": label, "share": share, "kind": kind}
            for label, share, kind in bars
            if share is not None
        ],
        "groups": len(sizes),
        "smallest": min(sizes),
        "largest": max(sizes),
        "in_none": int((memberships == 0).sum()),
        "in_several": int((memberships > 1).sum()),
        "num_classes": evidence.num_classes,
    }


def group_cards(evidence: Evidence) -> dict:
    """Groups by how much confusion they hold, each with its families of look-alikes."""
    predicted, labels = evidence.before["top5"][:, 0], evidence.labels
    wrong, typical = (
        predicted != labels,
        tables.typical_examples(labels, evidence.before["label_probability"]),
    )
    cards = []
    for m, members in enumerate(evidence.groups):
        inside = np.zeros(evidence.num_classes, dtype=bool)
        inside[members] = True
        caught = wrong & inside[labels] & inside[predicted]
        cards.append(
            {"index": m, "size": len(members), "members": members, "errors": int(caught.sum())}
        )
    cards.sort(key=lambda card: (-card["errors"], card["index"]))
    for card in cards[:MOST_GROUPS]:
        m, members = card["index"], card.pop("members")
        shown, families = 0, []
        for family in tables.families(members, evidence.weights):
            if shown + len(family) > MOST_TILES:
                break
            families.append([{"c": c, "row": typical.get(c)} for c in family])
            shown += len(family)
        if not families:
            families = [[{"c": int(c), "row": typical.get(int(c))}] for c in members[:MOST_TILES]]
            shown = len(families)
        card |= {
            "families": families,
            "rest": card["size"] - shown,
            "forecast": evidence.forecast(m),
            "specialist": evidence.specialist.get(m),
            "changes": evidence.changes(m),
            "missing": m in evidence.missing,
            "skipped": m in evidence.skipped,
        }
    return {"cards": cards[:MOST_GROUPS], "rest": max(len(cards) - MOST_GROUPS, 0)}


def specialist_rows(evidence: Evidence) -> dict:
    """Each specialist's conditional accuracy before and after, the largest gain first."""
    known = [
        row
        for row in evidence.results["specialists"]
        if row.get("conditional_before") is not None and row.get("conditional_after") is not None
    ]
    if not known:
        return {
            "rows": [],
            "rest": 0,
            "before": None,
            "unmeasured": len(evidence.results["specialists"]),
        }
    values = [row[key] for row in known for key in ("conditional_before", "conditional_after")]
    low, high = min(values), max(values)
    rows = [
        {
            **row,
            "difference": row["conditional_after"] - row["conditional_before"],
            "forecast": evidence.forecast(row["index"]),
            "changes": evidence.changes(row["index"]),
            "svg": plots.dumbbell(row["conditional_before"], row["conditional_after"], low, high),
        }
        for row in known
    ]
    rows.sort(key=lambda row: (-row["difference"], row["index"]))
    n = np.array([row["n"] for row in known], dtype=float)
    means = [
        np.average([row[key] for row in known], weights=n) if n.sum() else None
        for key in ("conditional_before", "conditional_after")
    ]
    return {
        "rows": rows[:MOST_SPECIALISTS],
        "rest": max(len(rows) - MOST_SPECIALISTS, 0),
        "before": means[0],
        "after": means[1],
        "low": low,
        "high": high,
        "unmeasured": len(evidence.results["specialists"]) - len(known),
    }


def forecast_plot(evidence: Evidence):
    """What the ensemble healed on test against the forecast from val, a point for each group; None without one."""
    points, n = [], len(evidence.labels)
    for m in range(len(evidence.groups)):
        forecast, changes = evidence.forecast(m), evidence.changes(m)
        if forecast is not None and changes is not None:
            net = (changes[0] - changes[1]) / n
            name = f"group {m}: forecast at most {_points(forecast)} points, net {_points(net)}"
            points.append({"name": name, "kind": "ensemble", "x": 100 * forecast, "y": 100 * net})
    if not points:
        return None
    return plots.scatter(
        points,
        "forecast from val: points that a perfect specialist would add",
        "points gained on test",
        diagonal=True,
    )


def frequency(evidence: Evidence) -> dict:
    """Accuracy by class-frequency decile, as a plot and as rows."""
    counts, split = evidence.class_counts
    if len(np.unique(counts[np.unique(evidence.labels)])) == 1:
        return {"split": split, "same": int(counts[evidence.labels[0]]), "rows": []}
    rows = tables.frequency_deciles(counts, evidence.labels, evidence.right)
    shown = [
        name
        for name in ("generalist", "control_compute", "ensemble", "main")
        if name in evidence.right
    ]
    series = [
        {
            "name": name,
            "kind": KINDS.get(name, "student"),
            "points": [(i + 1, row["accuracy"][name]) for i, row in enumerate(rows)],
        }
        for name in shown
    ]
    drawing = plots.lines(
        series,
        f"tenth of the classes, rarest first (examples in {split})",
        "top-1",
        markers=True,
        y_text=plots.whole_percent,
        x_ticks=[(i + 1, row["most"]) for i, row in enumerate(rows)],
    )
    return {
        "split": split,
        "same": None,
        "rows": rows,
        "shown": shown,
        "svg": drawing,
        "legend": [(one["name"], one["kind"]) for one in series],
        "ties": any(a["most"] == b["least"] for a, b in zip(rows, rows[1:], strict=False)),
    }


def calibration_rows(results: dict) -> list[dict]:
    """NLL, Brier and ECE before and after temperature scaling; no rows where none was fitted."""
    named = figures.named_rows(results)
    if not any(row.get("temperature") is not None for row in named.values()):
        return []
    keys = ("nll", "cnll", "brier", "cbrier", "ece", "cece")
    best, kinds = {key: best_of(named, key) for key in keys}, kinds_of(named)
    return [
        {
            "name": name,
            "kind": kinds[name],
            "temperature": row.get("temperature"),
            "cells": [
                {
                    "text": figures.number(row.get(key)),
                    "best": row.get(key) is not None and row[key] == best[key],
                }
                for key in keys
            ],
        }
        for name, row in named.items()
    ]


def reliability_panels(evidence: Evidence) -> dict:
    """Reliability diagrams, as answered and after temperature scaling: generalist, ensemble, then students and
    controls, MOST_PANELS in all, in the table's order."""
    named = figures.named_rows(evidence.results)
    files = {
        name: figures.read_evaluation(evidence.run.evaluate, name.removeprefix("student "))
        for name in named
    }
    drawn = [name for name, found in files.items() if found and found.get("reliability")]
    rank = {"generalist": 0, "ensemble": 0, **{name: 2 for name in evidence.results["controls"]}}
    chosen = sorted(drawn, key=lambda name: rank.get(name, 1))[:MOST_PANELS]
    panels, kinds = [], kinds_of(named)
    for name in drawn:
        if name not in chosen:
            continue
        row, found, kind = named[name], files[name], kinds[name]
        diagrams = [
            {
                "title": "as answered",
                "ece": row["ece"],
                "svg": plots.reliability(found["reliability"], kind, f"Reliability of {name}"),
            }
        ]
        if found.get("reliability_calibrated"):
            scaled = plots.reliability(
                found["reliability_calibrated"], kind, f"Reliability of {name}, calibrated"
            )
            diagrams.append(
                {"title": f"at T = {row['temperature']:.2f}", "ece": row.get("cece"), "svg": scaled}
            )
        panels.append({"name": name, "kind": kind, "diagrams": diagrams})
    return {"panels": panels, "rest": len(drawn) - len(panels), "fewest": plots.FEWEST}


def diversity_table(results: dict) -> dict | None:
    """What members disagree in, what a row is worth in members, and how well it tells inputs of other kinds: the
    columns that any row fills; None where none does."""
    named = figures.named_rows(results)
    columns = [
        ("members", lambda row: _count(row.get("members") or {}, "count")),
        ("DEE", lambda row: figures.worth(row, results)),
        ("MU", lambda row: figures.number((row.get("members") or {}).get("mu"))),
        ("pairwise KL", lambda row: figures.number((row.get("members") or {}).get("pairwise_kl"))),
        (
            "disagreement",
            lambda row: figures.percent((row.get("members") or {}).get("disagreement")),
        ),
    ] + [
        (
            f"AUROC by {title}",
            lambda row, key=key: figures.number((row.get("ood_auroc") or {}).get(key)),
        )
        for key, title in (("confidence", "confidence"), ("entropy", "entropy"), ("mu", "MU"))
    ]
    texts = {name: [text(row) for _, text in columns] for name, row in named.items()}
    filled = [i for i in range(len(columns)) if any(cells[i] != "–" for cells in texts.values())]
    if not filled:
        return None
    kinds = kinds_of(named)
    rows = [
        {"name": name, "kind": kinds[name], "cells": [cells[i] for i in filled]}
        for name, cells in texts.items()
        if any(cells[i] != "–" for i in filled)
    ]
    return {
        "columns": [columns[i][0] for i in filled],
        "rows": rows,
        "members": any("members" in row for row in named.values()),
        "ood": any("ood_auroc" in row for row in named.values()),
    }


def _count(values: dict, key: str) -> str:
    return "–" if values.get(key) is None else f"{values[key]:,}"


def size_rows(results: dict) -> list[dict]:
    """The ensemble's first 1, 2, ... members together, the first and the last among those shown."""
    sizes = results.get("sizes") or []
    kept = {round(i * (len(sizes) - 1) / (MOST_SIZES - 1)) for i in range(MOST_SIZES)}
    keys = ("size", "top1", "nll", "cnll", "temperature")
    return [
        {key: row.get(key) for key in keys}
        for i, row in enumerate(sizes)
        if len(sizes) <= MOST_SIZES or i in kept
    ]


def size_plot(results: dict) -> dict | None:
    """Calibrated NLL over the ensemble's size, every student and its hard twin at its DEE; None without sizes.

    What is worse than one network by more than the whole ensemble is better would press all else flat: "off" names it.
    """
    sizes = [
        (row["size"], row["cnll"])
        for row in results.get("sizes") or []
        if row.get("cnll") is not None
    ]
    if not sizes:
        return None
    worst, best = max(y for _, y in sizes), min(y for _, y in sizes)
    named = figures.named_rows(results)
    kinds, placed, off = kinds_of(named), [], []
    for name, row in named.items():
        placeable = row.get("cnll") is not None and (
            row.get("dee") is not None or row.get("dee_beyond")
        )
        if name in ("generalist", "ensemble") or not placeable:
            continue
        short, worth = name.removeprefix("student "), figures.worth(row, results)
        if worst > best and row["cnll"] > worst + (worst - best):
            off.append(f"{short} ({row['cnll']:.3f})")
        else:
            placed.append(
                {
                    "name": f"{name}: cNLL {row['cnll']:.4f}, DEE {worth}",
                    "kind": kinds[name],
                    "label": f"{short} {worth}",
                    "x": row.get("dee"),
                    "y": row["cnll"],
                }
            )
    drawing = plots.equivalents(sizes, placed, "networks in the ensemble", "calibrated NLL")
    return {"svg": drawing, "off": ", ".join(off)}


def changed_examples(evidence: Evidence) -> list[dict]:
    """Test examples that the ensemble put right, and those that it spoilt: an evenly spaced sample of each."""
    was, now = evidence.right["generalist"], evidence.right["ensemble"]
    typical = tables.typical_examples(evidence.labels, evidence.before["label_probability"])
    found = []
    for kind, title, chosen in (("good", "Put right", now & ~was), ("bad", "Spoilt", was & ~now)):
        rows, examples = np.flatnonzero(chosen), []
        for row in tables.spread(rows, MOST_EXAMPLES).tolist():
            answers = [
                {
                    "who": who,
                    "c": int(p["top5"][row, 0]),
                    "probability": float(p["top5_probability"][row, 0]),
                    "right": bool(right[row]),
                    "row": typical.get(int(p["top5"][row, 0])),
                }
                for who, p, right in (
                    ("generalist", evidence.before, was),
                    ("ensemble", evidence.after, now),
                )
            ]
            examples.append({"row": row, "c": int(evidence.labels[row]), "answers": answers})
        found.append({"kind": kind, "title": title, "total": len(rows), "examples": examples})
    return found


def picture_rows(groups: dict | None, examples: list[dict]) -> set[int]:
    """Every test row of which the page shows a picture."""
    cards = groups["cards"] if groups else []
    rows = {tile["row"] for card in cards for family in card["families"] for tile in family}
    for part in examples:
        for example in part["examples"]:
            rows |= {example["row"], *(answer["row"] for answer in example["answers"])}
    return rows - {None}


def run_facts(evidence: Evidence) -> list[tuple[str, str]]:
    """Seed, sizes, machine, commit: the conditions of every figure above."""
    run, results = evidence.run, evidence.results
    done = run.evaluate.done() or {}
    finished = (
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(done["finished"]))
        if "finished" in done
        else "–"
    )
    facts = [
        ("run", str(run.root.resolve())),
        ("seed", str(run.config.seed)),
        ("evaluated", finished),
        ("classes", f"{evidence.num_classes:,}"),
        ("test examples", f"{results['ensemble']['n']:,}"),
        ("members", f"{run.config.ensemble.members}")
        if evidence.is_deep
        else ("groups", f"{len(evidence.groups)}"),
        ("network", run.config.model.name),
    ]
    try:
        environment = read_json(run.root / "environment.json")
    except (OSError, ValueError):
        environment = {"environment": "environment.json is missing"}
    return facts + list(_flat(environment))


def _flat(value, prefix: str = ""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix} {key}".strip())
    elif isinstance(value, list):
        yield prefix, ", ".join(str(item) for item in value)
    else:
        yield prefix, "–" if value is None else str(value)


def stage_times(run: RunDirectory) -> list[dict]:
    """Seconds of each finished stage, the specialists and the members of a deep ensemble together."""
    together = {"specialist": "specialists", "member": "members"}
    times: dict[str, list[float]] = {}
    for stage in run.stages:
        done = stage.done()
        if done is not None and "seconds" in done:
            times.setdefault(together.get(stage.name, stage.place), []).append(done["seconds"])
    return [
        {"place": place, "jobs": len(seconds), "seconds": sum(seconds)}
        for place, seconds in times.items()
    ]


def _signed(value: float, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def _points(share: float | None, digits: int = 2) -> str:
    """A difference of shares in percentage points."""
    return "–" if share is None else _signed(100 * share, digits)


def _flow(text: str) -> str:
    """Text whose `top-1` no line break tears apart: a word joiner behind the hyphen."""
    return text.replace("top-1", "top-\N{WORD JOINER}1")


def _bytes(value: float | None) -> str:
    if not value:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
