"""Several finished runs beside each other: mean and sample deviation over repetitions.  No torch, no numpy here.

A repetition is another seed; runs whose configs differ in more are variants.  `referral compare` prints what is found
here, trainer.commands.compare_plot draws it.
"""

from __future__ import annotations

import difflib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import UserError, flat, load_config
from .graph import RunDirectory
from .results import errors, named_rows
from .store import read_json

SCHEMA = 1
OF_NO_FIGURE = ("seed", "engine.", "launch.", "slurm.")  # keys that make no variant of a run
WHERE_DATA_LIES = ("data.train", "data.val", "data.test", "data.transfer", "data.ood")


@dataclass(frozen=True)
class Metric:
    """label: of a column.  place: keys below a row of results.json.  Shown as scale x value with `digits` decimals."""

    label: str
    place: tuple[str, ...]
    scale: float = 1.0
    digits: int = 4


METRICS = {
    "top1": Metric("top-1, %", ("top1",), 100, 2),
    "top5": Metric("top-5, %", ("top5",), 100, 2),
    "macro_top1": Metric("macro top-1, %", ("macro_top1",), 100, 2),
    "errors": Metric("errors", ("errors",), 1, 1),
    "nll": Metric("NLL", ("nll",)),
    "cnll": Metric("cNLL", ("cnll",)),
    "brier": Metric("Brier", ("brier",)),
    "cbrier": Metric("cBrier", ("cbrier",)),
    "ece": Metric("ECE", ("ece",)),
    "cece": Metric("cECE", ("cece",)),
    "temperature": Metric("temperature", ("temperature",), 1, 3),
    "dee": Metric("DEE", ("dee",), 1, 2),
    "mu": Metric("MU", ("members", "mu")),
    "pairwise_kl": Metric("pairwise KL", ("members", "pairwise_kl")),
    "disagreement": Metric("disagreement, %", ("members", "disagreement"), 100, 2),
    "ood_confidence": Metric("AUROC confidence", ("ood_auroc", "confidence")),
    "ood_entropy": Metric("AUROC entropy", ("ood_auroc", "entropy")),
    "ood_mu": Metric("AUROC MU", ("ood_auroc", "mu")),
    "seconds": Metric("time, s", ("cost", "seconds"), 1, 1),
    "examples_seen": Metric("examples, M", ("cost", "examples_seen"), 1e-6, 3),
    "peak_memory_bytes": Metric("memory, MiB", ("cost", "peak_memory_bytes"), 2**-20, 0),
}
BY_THEMSELVES = (
    "top1",
    "nll",
    "cnll",
    "ece",
    "dee",
)  # shown where nobody says which, as far as the runs have them


def figure(row: dict, metric: str) -> float | None:
    """One figure of one row; inf for a DEE beyond the largest ensemble, None where the run does not have it."""
    if metric == "errors":
        return errors(row)
    if metric == "dee" and row.get("dee_beyond"):
        return math.inf
    for key in METRICS[metric].place:
        row = (row or {}).get(key)
    return row


def moments(values: Sequence[float]) -> dict:
    """{"n", "mean", "deviation"}: the sample deviation, sqrt(sum (x - mean)^2 / (n - 1)), None for fewer than two.

    A DEE beyond the largest ensemble has no number: then {"beyond": how many} and no mean, for one over the others
    would be too low.
    """
    beyond = sum(math.isinf(value) for value in values)
    if beyond or not values:
        return {
            "n": len(values),
            "mean": None,
            "deviation": None,
            **({"beyond": beyond} if beyond else {}),
        }
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"n": len(values), "mean": statistics.fmean(values), "deviation": deviation}


@dataclass(frozen=True)
class FinishedRun:
    """place: as the user named it.  settings: dotted config key -> value.  compared: those that can make a variant."""

    place: str
    seed: int
    settings: dict
    compared: dict
    rows: dict[str, dict]


def read_runs(places: Iterable[str | Path]) -> list[FinishedRun]:
    """Raises UserError for what is no run, is not finished, or is named twice, be it as a copy."""
    found, seen = [], {}
    for place in map(Path, places):
        if not (place / "config.toml").is_file():
            raise UserError(f"{place} is not a run: it has no config.toml")
        run = RunDirectory(place, load_config(place / "config.toml"))
        if run.report.done() is None or not (place / "results.json").is_file():
            raise UserError(f"{place} is not finished: referral run --run {place}")
        marker = (run.evaluate.done() or {}).get("attempt", str(place.resolve()))
        if marker in seen:
            raise UserError(f"{seen[marker]} and {place} are the same run")
        seen[marker] = place
        found.append(
            FinishedRun(
                str(place),
                run.config.seed,
                flat(run.config.dump()),
                flat(run.identity.values),
                named_rows(read_json(place / "results.json")),
            )
        )
    return found


def differing(settings: Sequence[dict]) -> list[str]:
    """The keys whose values are not the same everywhere; an absent key is a value too."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]


def _follows(key: str, settings: Sequence[dict]) -> bool:
    """Whether a key of [specialists] or [students.NAME] says in every run what [train] says: it is inherited."""
    section, _, last = key.rpartition(".")
    inherits = section == "specialists" or section.startswith("students.")
    return inherits and all(one.get(key) == one.get(f"train.{last}") for one in settings)


def compare(
    runs: Sequence[FinishedRun],
    metrics: Sequence[str] = (),
    by: Sequence[str] = (),
    versus: str | None = None,
) -> dict:
    """What the runs have in common and how far they scatter, JSON-able.

    metrics: names of METRICS; none: BY_THEMSELVES.  by: the config keys that tell variants apart; none: all that
    differ but for the seed and where the data lie.  versus: a row; every figure is then the difference to that of
    this row in the same run.
    {"schema", "metrics", "versus", "differ", "runs": [{"run", "seed", "variant"}],
     "variants": [{"name", "settings", "runs": n}],
     "rows": [{"row", "variant", "runs": n, "figures": {metric: {"n", "mean", "deviation", "values": {run: x}}}}]}
    """
    metrics = _known_metrics(runs, metrics)
    if by:
        known = dict.fromkeys(key for run in runs for key in run.settings)
        for key in by:
            if key not in known:
                raise UserError(f"--by {key}: no run's config has this key{_near(key, known)}")
    compared = [run.compared for run in runs]
    differ = [
        key
        for key in differing(compared)
        if not key.startswith(OF_NO_FIGURE) and not _follows(key, compared)
    ]
    keys = list(by) or [key for key in differ if key not in WHERE_DATA_LIES]
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.settings.get(key) for key in keys]), []).append(run)
    names = list(dict.fromkeys(name for run in runs for name in run.rows))
    if versus is not None and versus not in names:
        raise UserError(f"--versus {versus}: the runs' rows are {', '.join(names)}")
    called = {
        run.place: _letters(number) for number, group in enumerate(groups.values()) for run in group
    }
    return {
        "schema": SCHEMA,
        "metrics": metrics,
        "versus": versus,
        "differ": differ,
        "runs": [
            {"run": run.place, "seed": run.seed, "variant": called[run.place]} for run in runs
        ],
        "variants": [
            {
                "name": called[group[0].place],
                "settings": {key: _plain(group[0].settings.get(key)) for key in keys},
                "runs": len(group),
            }
            for group in groups.values()
        ],
        "rows": [
            {
                "row": name,
                "variant": called[group[0].place],
                "runs": sum(name in run.rows for run in group),
                "figures": {metric: _over(group, name, metric, versus) for metric in metrics},
            }
            for name in sorted(names, key=_place)
            if name != versus
            for group in groups.values()
            if any(name in run.rows for run in group)
        ],
    }


def _over(group: Sequence[FinishedRun], name: str, metric: str, versus: str | None) -> dict:
    """One row's figure over the runs of one variant; the runs that lack it are left out of n."""
    values = {}
    for run in group:
        if name not in run.rows or (versus is not None and versus not in run.rows):
            continue
        value = figure(run.rows[name], metric)
        if versus is not None and value is not None:
            base = figure(run.rows[versus], metric)
            value = None if base is None or math.isinf(base) else value - base
        if value is not None:
            values[run.place] = value
    finite = {place: None if math.isinf(value) else value for place, value in values.items()}
    return {**moments(list(values.values())), "values": finite}


def _known_metrics(runs: Sequence[FinishedRun], metrics: Sequence[str]) -> list[str]:
    """The metrics asked for, or those of BY_THEMSELVES that some run has."""

    def had(metric: str) -> bool:
        return any(figure(row, metric) is not None for run in runs for row in run.rows.values())

    for metric in metrics:
        if metric not in METRICS:
            raise UserError(
                f"--metric {metric}: must be of {', '.join(METRICS)}{_near(metric, METRICS)}"
            )
        if not had(metric):
            others = ", ".join(filter(had, METRICS))
            raise UserError(f"--metric {metric}: none of these runs has it; they have {others}")
    return list(dict.fromkeys(metrics)) or [metric for metric in BY_THEMSELVES if had(metric)]


def _near(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _plain(value):
    """JSON has no infinity, a temperature may be one."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _place(name: str) -> int:
    """Rows in the order of named_rows, whichever runs have which: generalist, controls, ensemble, students."""
    return {"generalist": 0, "ensemble": 2}.get(name, 3 if name.startswith("student ") else 1)


def _letters(number: int) -> str:
    """A, B, ..., Z, A1, B1, ..."""
    return chr(ord("A") + number % 26) + (str(number // 26) if number >= 26 else "")


# How it looks


def sentences(found: dict) -> list[str]:
    """What one must know before reading the figures: how many runs, in what they differ, what stands for what."""
    runs, variants = found["runs"], found["variants"]
    seeds = sorted({run["seed"] for run in runs})
    which = f"{_counted(len(runs), 'run')}, {_counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
    said = [f"{which}; mean ± sample deviation over runs"]
    if found["versus"]:
        said[0] += f" of the difference to {found['versus']} in the same run"
    if found["differ"]:
        said.append(f"beside the seed they differ in {_shortened(found['differ'])}")
    data = [key for key in found["differ"] if key in WHERE_DATA_LIES]
    if data and not set(data) & set(variants[0]["settings"]):
        said.append(f"other data alone makes no variant: --by {data[0]} tells them apart")
    if len(variants) > 1:
        said += [
            f"{one['name']}: {setting(one)} ({_counted(one['runs'], 'run')})" for one in variants
        ]
    for one in variants:
        own = [run["seed"] for run in runs if run["variant"] == one["name"]]
        twice = sorted({seed for seed in own if own.count(seed) > 1})
        if twice:
            where = f" in {one['name']}" if len(variants) > 1 else ""
            said.append(
                f"seed {', '.join(map(str, twice))} more than once{where}: such runs are no independent draws"
            )
    return said


def setting(variant: dict) -> str:
    """`clusters.num_groups = 24, specialists.steps = 600`"""
    parts = [
        f"{key} = {'not set' if v is None else json.dumps(v)}"
        for key, v in variant["settings"].items()
    ]
    return _shortened([part if len(part) <= 60 else part[:57] + "..." for part in parts])


def cell(found: dict, metric: str, signed: bool = False) -> str:
    """`78.25 ± 0.34`; one run has no deviation, and a DEE beyond the largest ensemble no mean."""
    scale, digits = METRICS[metric].scale, METRICS[metric].digits
    if found.get("beyond"):
        return f"beyond in {found['beyond']} of {found['n']}"
    if found["mean"] is None:
        return "–"
    text = f"{scale * found['mean']:{'+' if signed else ''}.{digits}f}"
    return (
        text if found["deviation"] is None else f"{text} ± {scale * found['deviation']:.{digits}f}"
    )


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _shortened(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def words(text: str) -> list[str]:
    """The parts between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]
