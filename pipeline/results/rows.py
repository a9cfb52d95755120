"""What results.json holds, and what every reader works out of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict, cast

from ..advice.outcomes import Outcomes
from ..files import damaged, picking_from, read_json

MetricName = Literal["top1", "nll", "cnll"]  # what rows are compared in

SAME_SIZE = 0.05  # networks whose sizes differ by less are alike


class Metrics(TypedDict):
    """A predictor on n test examples.  Runs of older versions lack some metrics: they are None."""

    n: int
    top1: float
    top5: float | None
    nll: float | None
    brier: float | None
    ece: float | None
    macro_top1: float | None


class MemberMetrics(TypedDict):
    """How much members disagree: in nats, and for `disagreement` a fraction of examples."""

    count: int
    mu: NotRequired[float | None]
    pairwise_kl: NotRequired[float | None]
    disagreement: NotRequired[float | None]


class Paired(TypedDict):
    """A row less another one, over the same test examples.

    top1 is a fraction of them, nll in nats. The halves are those of the 95 % intervals, by the
    normal approximation.  Variation between seeds is not in them.
    cnll: the calibrated NLL, where the evaluation kept what pairs it.
    """

    top1: float
    top1_half: float
    nll: float
    nll_half: float
    cnll: NotRequired[float]
    cnll_half: NotRequired[float]


class FurtherMetrics(TypedDict, total=False):
    """What not every row has.

    parameters: of all its networks.  multiplications: of one example, on average. Softmaxes, norms
        and activations are not counted.
    asked: networks that an example asks beside the generalist, on average: specialists, or members.
    versus: the paired difference to other rows, by their names: "generalist", "ensemble", a twin.
    temperature, cnll, cbrier, cece: after temperature scaling.
    members: of a network or an ensemble of several members.
    dee: the row's worth in networks of the run's deep ensemble. None, and dee_beyond, for more than
        all of them.
    ood_auroc: how well a score tells test from [data] ood, by the score.
    old_classes, new_classes: the same metrics on their test examples, in a run that adds classes.
    """

    parameters: int
    multiplications: int
    asked: float
    versus: dict[str, Paired]
    temperature: float | None
    cnll: float | None
    cbrier: float | None
    cece: float | None
    members: MemberMetrics
    dee: float | None
    dee_beyond: bool
    ood_auroc: dict[str, float | None]
    old_classes: Metrics
    new_classes: Metrics


class Cost(TypedDict):
    """What the training of a row took, with all that it starts from, and what an answer takes.

    latency_ms: milliseconds of an example by the size of the batch, measured on one thread.
    softmax_ms: in the generalist's row, of its softmax over all classes alone.
    cpu_seconds: of all ranks' processes, of a training on CPUs.
    """

    seconds: float | None
    examples_seen: int | None
    peak_memory_bytes: int | None
    latency_ms: NotRequired[dict[str, float]]
    softmax_ms: NotRequired[dict[str, float]]
    cpu_seconds: NotRequired[float]


class Row(Metrics, FurtherMetrics):
    """One predictor of a run: the generalist, the ensemble, a control or a student."""

    cost: Cost


class Clusters(TypedDict):
    """The groups, by test errors of the generalist whose two classes share one.

    captured_confusion: the fraction of such errors, None where there is no error.
    chance: the same, expected of random groups of these sizes.
    captured_unlabelled: the fraction of the confusion that predictions alone forecast.
    sizes: classes of each group.
    """

    captured_confusion: float | None
    chance: float | None
    captured_unlabelled: float | None
    sizes: list[int] | None


class SpecialistMetrics(TypedDict):
    """A specialist on the n test examples of its classes, predictions restricted to these.

    conditional_before, conditional_after: top-1 of the generalist and of the specialist.
    gain: their difference.  Where n is 0 none of the three is there.
    routed: test examples for which the gate opens it.
    """

    index: int
    classes: int
    routed: int
    n: int
    conditional_before: NotRequired[float]
    conditional_after: NotRequired[float]
    gain: NotRequired[float]
    cost: Cost


class SizeRow(TypedDict):
    """The first `size` members of a deep ensemble together."""

    size: int
    temperature: float | None
    nll: float | None
    cnll: float | None
    top1: float | None


class AddedClasses(TypedDict):
    """How many classes the older run had, and how many are new.

    top1_before: the older generalist on the test examples of its classes, among these alone.
    """

    run: str
    old: int
    new: int
    top1_before: NotRequired[float | None]


class MissingControls(TypedDict):
    """Rivals that were not made.  command: the line that makes them. RUN stands for the run."""

    names: list[str]
    command: str


class Results(TypedDict):
    """results.json.

    student: the row of the student called main.  dropped: specialists that the ensemble goes
    without, since no step of theirs was better on val than the generalist.  advice: in runs that
    pilots advised and its measured gain.
    """

    generalist: Row
    ensemble: Row
    controls: dict[str, Row]
    missing_controls: NotRequired[MissingControls | None]
    students: dict[str, Row]
    student: Row | None
    added: NotRequired[AddedClasses]
    sizes: NotRequired[list[SizeRow]]
    clusters: NotRequired[Clusters]
    specialists: NotRequired[list[SpecialistMetrics]]
    dropped: NotRequired[list[int]]
    advice: NotRequired[Outcomes]
    damage: dict[str, dict]


def read_results(path: Path) -> Results:
    """A results.json.  Raises DamagedFile where it does not hold a run's rows."""
    results = read_json(path)
    with picking_from(path):
        for name, row in named_rows(results).items():
            if not isinstance(row["top1"], (int, float)):
                raise damaged(path, f"{name} has no top1")
    return results


def named_rows(results: Results) -> dict[str, Row]:
    """Every row under its name, in the order in which people compare them."""
    return {
        "generalist": results["generalist"],
        **results["controls"],
        "ensemble": results["ensemble"],
        **{f"student {name}": row for name, row in results["students"].items()},
    }


def errors(row: Metrics) -> int:
    """Top-1 errors, the whole number that n and top1 stand for."""
    return row["n"] - round(row["n"] * row["top1"])


def share_of_gain(row: Metrics, results: Results) -> float | None:
    """How much of the ensemble's gain over the generalist a row keeps, in top-1 errors.

    1 is all of it, negative is worse than the generalist.  None where the ensemble gains nothing.
    """
    before, after = errors(results["generalist"]), errors(results["ensemble"])
    if after >= before:
        return None
    return (before - errors(row)) / (before - after)


def share_kept(row: Row, results: Results) -> float | None:
    """`share_of_gain` as a report says it: never more than 1.

    None for a network of another size than the generalist's, too, which gains by its size.
    """
    share = share_of_gain(row, results)
    if share is None or is_of_another_size(row, results["generalist"]):
        return None
    return min(1.0, share)


def is_of_another_size(row: Row, generalist: Row) -> bool:
    """Whether its parameters or multiplications differ. False where a run does not say."""
    return any(
        abs(row.get(key, 0) / generalist.get(key, 1) - 1) > SAME_SIZE
        for key in ("parameters", "multiplications")
        if row.get(key) and generalist.get(key)
    )


class Difference(NamedTuple):
    """A row's metric less another row's, and half its paired 95 % interval."""

    value: float
    half: float

    @property
    def is_measurable(self) -> bool:
        """Whether the interval holds no zero."""
        return abs(self.value) > self.half


def difference_to(row: Row, name: str, metric: MetricName) -> Difference | None:
    """The paired difference to the row `name`. None where no evaluation kept what pairs it."""
    paired = cast("dict[str, float]", row.get("versus", {}).get(name) or {})
    if metric not in paired:
        return None
    return Difference(paired[metric], paired[f"{metric}_half"])


def compare_paired(row: Row, name: str, other: Row, metric: MetricName) -> int:
    """1 where a row is better than another one, -1 where it is worse, 0 where neither is.

    Measurably so, where the paired difference to `name` is known, else by the numbers alone.
    """
    difference = difference_to(row, name, metric)
    if difference is None:
        return _compare_alone(row, other, metric)
    if not difference.is_measurable:
        return 0
    return _sign(difference.value if metric == "top1" else -difference.value)


def _compare_alone(row: Row, other: Row, metric: MetricName) -> int:
    if metric == "top1":
        return _sign(errors(other) - errors(row))
    value, other_value = row.get(metric), other.get(metric)
    if value is None or other_value is None:
        return _sign(int(value is not None) - int(other_value is not None))
    return _sign(other_value - value)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
