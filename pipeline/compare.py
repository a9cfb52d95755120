"""Several finished runs beside each other: mean and sample deviation over repetitions.

A repetition is another seed. Runs whose configs differ in more are variants.  `referral compare`
prints what is found here, trainer.commands.compare_plot draws it.  No torch and no numpy here.
"""

from __future__ import annotations

import difflib
import json
import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from .config import UserError, flat, load_config
from .graph import RunDirectory
from .redaction import redacted
from .results import Row, errors, named_rows, read_results

SCHEMA = 1
OF_NO_METRIC = ("seed", "engine.", "launch.", "slurm.")  # keys that make no variant of a run
WHERE_DATA_LIES = ("data.train", "data.val", "data.test", "data.transfer", "data.ood")


@dataclass(frozen=True)
class Metric:
    """A metric and how it is shown.

    label: of its column.  keys: where a row of results.json has it.
    It is shown as scale x value with `digits` decimals.
    """

    label: str
    keys: tuple[str, ...]
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
    "parameters": Metric("parameters", ("parameters",), 1, 0),
    "multiplications": Metric("multiplications, k", ("multiplications",), 1e-3, 1),
    "asked": Metric("asked", ("asked",), 1, 2),
    "latency": Metric("latency, ms", ("cost", "latency_ms", "1"), 1, 3),
    "seconds": Metric("time, s", ("cost", "seconds"), 1, 1),
    "examples_seen": Metric("examples, M", ("cost", "examples_seen"), 1e-6, 3),
    "peak_memory_bytes": Metric("memory, MiB", ("cost", "peak_memory_bytes"), 2**-20, 0),
}
DEFAULT_METRICS = ("top1", "nll", "cnll", "ece", "dee")  # as far as some run has them


@dataclass(frozen=True)
class FinishedRun:
    """A run to compare.

    path: as the user named it.  settings: dotted config key -> value.
    compared: those that can make a variant.
    """

    path: str
    seed: int
    settings: dict
    compared: dict
    rows: dict[str, Row]


# What `--json` writes


class Moments(TypedDict):
    """deviation: the sample deviation. None for fewer than two values.

    beyond: how many values are a DEE beyond the largest ensemble. Then mean and deviation are None.
    """

    n: int
    mean: float | None
    deviation: float | None
    beyond: NotRequired[int]


class Spread(Moments):
    """values: by run. None for a DEE beyond the largest ensemble."""

    values: dict[str, float | None]


class ComparedRow(TypedDict):
    """One row of the results in one variant.  runs: how many have it.  figures: by metric."""

    row: str
    variant: str
    runs: int
    figures: dict[str, Spread]


class Variant(TypedDict):
    """settings: the keys that tell variants apart.  runs: how many are of it."""

    name: str
    settings: dict
    runs: int


class ComparedRun(TypedDict):
    run: str
    seed: int
    variant: str


class Comparison(TypedDict):
    """differ: the config keys that are not the same in all runs, the seed left out."""

    schema: int
    metrics: list[str]
    versus: str | None
    differ: list[str]
    runs: list[ComparedRun]
    variants: list[Variant]
    rows: list[ComparedRow]


# Reading


def read_runs(paths: Iterable[str | Path]) -> list[FinishedRun]:
    """The runs as they are on disk.

    Raises UserError for what is no run, is not finished, or is named twice, be it as a copy.
    """
    runs: list[FinishedRun] = []
    path_of: dict[str, Path] = {}
    for path in map(Path, paths):
        run = _open_finished(path)
        attempt = (run.evaluate.done() or {}).get("attempt", str(path.resolve()))
        if attempt in path_of:
            raise UserError(f"{path_of[attempt]} and {path} are the same run")
        path_of[attempt] = path
        rows = named_rows(read_results(path / "results.json"))
        settings = flat(run.config.dump())
        compared = flat(run.identity.values)
        runs.append(FinishedRun(str(path), run.config.seed, settings, compared, rows))
    return runs


def _open_finished(path: Path) -> RunDirectory:
    if not (path / "config.toml").is_file():
        raise UserError(f"{path} is not a run: it has no config.toml")
    run = RunDirectory(path, load_config(path / "config.toml"))
    if run.report.done() is None or not (path / "results.json").is_file():
        raise UserError(f"{path} is not finished: referral run --run {shlex.quote(str(path))}")
    return run


# Comparing


def compare(
    runs: Sequence[FinishedRun],
    metrics: Sequence[str] = (),
    by: Sequence[str] = (),
    versus: str | None = None,
) -> Comparison:
    """Mean and scatter of each metric over runs, variant by variant.

    Parameters
    ----------
    runs : sequence of FinishedRun
        As `read_runs` returns them.
    metrics : sequence of str
        Names of METRICS. By default DEFAULT_METRICS, as far as some run has them.
    by : sequence of str
        The config keys that tell variants apart. By default all that differ, but for the seed and
        where the data lie.
    versus : str, optional
        A row. Every metric is then its difference to that of this row in the same run.

    Returns
    -------
    Comparison
        JSON-able: rows in the order of `named_rows`, one for each variant that has them.

    Raises
    ------
    UserError
        For a metric, a key or a row that no run has.
    """
    metrics = _known_metrics(runs, metrics)
    _check_keys(runs, by)
    compared = [run.compared for run in runs]
    differ = [key for key in differing(compared) if _makes_variant(key, compared)]
    keys = list(by) or [key for key in differ if key not in WHERE_DATA_LIES]
    names = list(dict.fromkeys(name for run in runs for name in run.rows))
    if versus is not None and versus not in names:
        raise UserError(f"--versus {versus}: the runs' rows are {', '.join(names)}")
    variants = _variants(runs, keys)
    variant_of = {run.path: name for name, group in variants.items() for run in group}
    rows: list[ComparedRow] = []
    for row in sorted(names, key=_rank):
        if row != versus:
            rows += _compared_rows(row, variants, metrics, versus)
    return {
        "schema": SCHEMA,
        "metrics": metrics,
        "versus": versus,
        "differ": differ,
        "runs": [
            {"run": run.path, "seed": run.seed, "variant": variant_of[run.path]} for run in runs
        ],
        "variants": [_variant(name, group, keys) for name, group in variants.items()],
        "rows": rows,
    }


def _known_metrics(runs: Sequence[FinishedRun], metrics: Sequence[str]) -> list[str]:
    """The metrics asked for, or those of DEFAULT_METRICS that some run has."""

    def is_there(metric: str) -> bool:
        rows = [row for run in runs for row in run.rows.values()]
        return any(value_of(row, metric) is not None for row in rows)

    for metric in metrics:
        if metric not in METRICS:
            names = ", ".join(METRICS)
            raise UserError(f"--metric {metric}: must be of {names}{_suggest(metric, METRICS)}")
        if not is_there(metric):
            others = ", ".join(filter(is_there, METRICS))
            raise UserError(f"--metric {metric}: none of these runs has it; they have {others}")
    return list(dict.fromkeys(metrics)) or [name for name in DEFAULT_METRICS if is_there(name)]


def _check_keys(runs: Sequence[FinishedRun], by: Sequence[str]) -> None:
    known = dict.fromkeys(key for run in runs for key in run.settings)
    for key in by:
        if key not in known:
            raise UserError(f"--by {key}: no run's config has this key{_suggest(key, known)}")


def _suggest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def differing(settings: Sequence[Mapping]) -> list[str]:
    """The keys whose values are not the same everywhere. An absent key is a value too."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]


def _makes_variant(key: str, settings: Sequence[Mapping]) -> bool:
    return not key.startswith(OF_NO_METRIC) and not _is_inherited(key, settings)


def _is_inherited(key: str, settings: Sequence[Mapping]) -> bool:
    """Whether a key of [specialists], [rerank] or [students.NAME] says what [train] says."""
    section, _, last = key.rpartition(".")
    inherits = section in ("specialists", "rerank") or section.startswith("students.")
    return inherits and all(one.get(key) == one.get(f"train.{last}") for one in settings)


def _variants(runs: Sequence[FinishedRun], keys: Sequence[str]) -> dict[str, list[FinishedRun]]:
    """The runs that agree in these keys, under a letter each."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        values = json.dumps([run.settings.get(key) for key in keys])
        groups.setdefault(values, []).append(run)
    return {_letter(index): group for index, group in enumerate(groups.values())}


def _letter(index: int) -> str:
    """A, B, ..., Z, A1, B1, ..."""
    cycle, position = divmod(index, 26)
    letter = chr(ord("A") + position)
    return f"{letter}{cycle}" if cycle else letter


def _variant(name: str, group: Sequence[FinishedRun], keys: Sequence[str]) -> Variant:
    settings = {key: _plain(group[0].settings.get(key)) for key in keys}
    return {"name": name, "settings": settings, "runs": len(group)}


def _plain(value):
    """The value as in JSON: a temperature may be infinite, which is text there."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _rank(row: str) -> int:
    """Rows in the order of named_rows, whichever runs have which."""
    if row.startswith("student "):
        return 3
    return {"generalist": 0, "ensemble": 2}.get(row, 1)  # controls between the two


def _compared_rows(
    row: str,
    variants: Mapping[str, Sequence[FinishedRun]],
    metrics: Sequence[str],
    versus: str | None,
) -> list[ComparedRow]:
    """One row of the results in each variant that has it."""
    compared: list[ComparedRow] = []
    for variant, group in variants.items():
        having = [run for run in group if row in run.rows]
        if having:
            figures = {metric: _spread(having, row, metric, versus) for metric in metrics}
            compared.append(
                {"row": row, "variant": variant, "runs": len(having), "figures": figures}
            )
    return compared


def _spread(runs: Sequence[FinishedRun], row: str, metric: str, versus: str | None) -> Spread:
    """One row's metric over runs. Those that lack it are left out of n."""
    values: dict[str, float] = {}
    for run in runs:
        value = _value_in(run, row, metric, versus)
        if value is not None:
            values[run.path] = value
    finite = {path: None if math.isinf(value) else value for path, value in values.items()}
    return {**moments(list(values.values())), "values": finite}


def _value_in(run: FinishedRun, row: str, metric: str, versus: str | None) -> float | None:
    """A row's metric, or its difference to that of the row `versus`."""
    value = value_of(run.rows[row], metric)
    if versus is None or value is None:
        return value
    if versus not in run.rows:
        return None
    base = value_of(run.rows[versus], metric)
    if base is None or math.isinf(base):
        return None
    return value - base


def value_of(row: Row, metric: str) -> float | None:
    """One metric of one row.

    inf for a DEE beyond the largest ensemble, None where the run does not have it.
    """
    if metric == "errors":
        return errors(row)
    if metric == "dee" and row.get("dee_beyond"):
        return math.inf
    value: Any = row
    for key in METRICS[metric].keys:
        value = (value or {}).get(key)
    return value


def moments(values: Sequence[float]) -> Moments:
    """Mean and sample deviation, sqrt(sum (x - mean)^2 / (n - 1)).

    A DEE beyond the largest ensemble, inf, has no number.  A mean over the others would be too low,
    so there is none.
    """
    n = len(values)
    beyond = sum(math.isinf(value) for value in values)
    if beyond:
        return {"n": n, "mean": None, "deviation": None, "beyond": beyond}
    if not values:
        return {"n": 0, "mean": None, "deviation": None}
    deviation = statistics.stdev(values) if n > 1 else None
    return {"n": n, "mean": statistics.fmean(values), "deviation": deviation}


# How it looks


def sentences(comparison: Comparison) -> list[str]:
    """What one must know before reading the metrics.

    How many runs there are, in what they differ, and what stands for what.
    """
    variants, differ = comparison["variants"], comparison["differ"]
    lines = [_runs_sentence(comparison)]
    if differ:
        lines.append(f"beside the seed the runs differ in {_shortened(differ)}")
    data = [key for key in differ if key in WHERE_DATA_LIES]
    if data and not set(data) & set(variants[0]["settings"]):
        lines.append(f"other data alone makes no variant: --by {data[0]} tells them apart")
    if len(variants) > 1:
        for variant in variants:
            runs = _counted(variant["runs"], "run")
            lines.append(f"{variant['name']}: {setting(variant)} ({runs})")
    if "dee" in comparison["metrics"]:
        lines.append("DEE: worth in networks of a deep ensemble; beyond: better than the largest")
    for variant in variants:
        lines += _repeated_seeds(comparison, variant["name"])
    return lines


def _runs_sentence(comparison: Comparison) -> str:
    runs = comparison["runs"]
    seeds = sorted({run["seed"] for run in runs})
    listed = ", ".join(map(str, seeds))
    line = (
        f"{_counted(len(runs), 'run')}, {_counted(len(seeds), 'seed')} ({listed}); "
        "mean ± sample deviation over runs"
    )
    if comparison["versus"]:
        line += f" of the difference to {comparison['versus']} in the same run"
    return line


def _repeated_seeds(comparison: Comparison, variant: str) -> list[str]:
    """A warning, if a variant has runs of the same seed."""
    seeds = [run["seed"] for run in comparison["runs"] if run["variant"] == variant]
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if not repeated:
        return []
    line = f"seed {', '.join(map(str, repeated))} more than once"
    if len(comparison["variants"]) > 1:
        line += f" in {variant}"
    return [f"{line}: such runs are no independent draws"]


def setting(variant: Variant) -> str:
    """`clusters.num_groups = 24, specialists.steps = 600`"""
    parts = []
    for key, value in variant["settings"].items():
        text = "not set" if value is None else json.dumps(value)
        parts.append(_abbreviated(redacted(f"{key} = {text}")))
    return _shortened(parts)


def _abbreviated(text: str, longest: int = 60) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest - 3]}..."


def cell(spread: Moments, metric: str, signed: bool = False) -> str:
    """`78.25 ± 0.34`. One run has no deviation, and a DEE beyond the largest ensemble no mean."""
    scale, digits = METRICS[metric].scale, METRICS[metric].digits
    mean, deviation = spread["mean"], spread["deviation"]
    beyond = spread.get("beyond")
    if beyond:
        return f"beyond in {beyond} of {spread['n']}"
    if mean is None:
        return "–"
    sign = "+" if signed else ""
    text = f"{scale * mean:{sign}.{digits}f}"
    if deviation is not None:
        text += f" ± {scale * deviation:.{digits}f}"
    return text


def words(text: str) -> list[str]:
    """The parts between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _shortened(names: Sequence[str], most: int = 6) -> str:
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text
