"""Planted groups of confusable classes: how well, how fast, in how much memory.

    OMP_NUM_THREADS=1 python -m benchmarks.clustering [--million | --gather | --quick]

    (neither)  15,000 and 100,000 classes in 300 groups     8 minutes
    --million  1,000,000 classes in 1,000 groups            4 minutes
    --gather   5,200 classes: the exact covariance against the 32 largest predictions
               a minute
    --quick    800 and 3,200 classes in 16 groups           seconds

Beside our methods stands "plain", what one would write with scikit-learn alone in a minute. "plain"
and "minibatch", not refined, take turns for --rounds rounds. Their ratio is the median of the
rounds'.

Each line is a case. Each case is one process of its own, so that its peak memory is its own
(--quick: all in this process, so that memory only grows). Seconds are the processor's (one thread),
which other work on the machine changes less than the clock's, wall_s, which stand beside them.
Exponents: log seconds over log classes, between the two sizes with equal groups and 10 samples a
class, and log seconds over log samples, at the smaller size.

The last line is one JSON object: the machine, the cases and what they come to.
"""

import argparse
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray
    from scipy.sparse import csr_array

BATCH = 8192


class Case(NamedTuple):
    """Planted groups, and who is to find them. Method "plain" is scikit-learn alone."""

    num_classes: int
    num_groups: int
    per_class: int
    method: str
    refine: bool


@dataclass
class Row:
    """What a case measured: seconds, adjusted Rand index, peak memory."""

    classes: int
    groups: int
    per_class: int
    method: str
    gather_s: float
    group_s: float
    wall_s: float
    ari: float
    peak_gib: float
    of_which_data_gib: float

    @property
    def seconds(self) -> float:
        return self.gather_s + self.group_s


@dataclass
class Sizes:
    """The classes of a run's cases: two sizes, one with four times the samples as well."""

    small: int
    large: int
    groups: int

    @property
    def cases(self) -> tuple[tuple[int, int], ...]:
        """(classes, samples per class)."""
        return (self.small, 10), (self.small, 40), (self.large, 10)


FULL = Sizes(small=15_000, large=100_000, groups=300)
QUICK = Sizes(small=800, large=3_200, groups=16)


def measure(case: Case) -> Row:
    """Plant the groups, gather the statistics, group the classes."""
    # All that either side imports, before the clock starts.
    import scipy.cluster.hierarchy  # noqa: F401
    import sklearn.cluster  # noqa: F401
    from sklearn.metrics import adjusted_rand_score

    from clustering import PredictionStatistics, group_classes

    planted = _planted()
    indices, values, _, group_of = planted.planted_predictions(
        case.num_classes, case.num_groups, case.per_class
    )
    data_gib = _peak_gib()
    wall_start, start = time.perf_counter(), time.process_time()
    if case.method == "plain":
        matrix = _matrix(indices, values, case.num_classes)
        gathered = time.process_time()
        labels = plain(matrix, case.num_groups)
    else:
        statistics = PredictionStatistics(case.num_classes, top_k=indices.shape[1])
        for row in range(0, len(indices), BATCH):
            statistics.update(indices[row : row + BATCH], values[row : row + BATCH])
        gathered = time.process_time()
        groups = group_classes(statistics, case.num_groups, case.method, refine=case.refine)
        labels = planted.labels_of(groups)
    end, wall_end = time.process_time(), time.perf_counter()
    return Row(
        classes=case.num_classes,
        groups=case.num_groups,
        per_class=case.per_class,
        method=case.method + (" + refine" if case.refine else ""),
        gather_s=round(gathered - start, 3),
        group_s=round(end - gathered, 3),
        wall_s=round(wall_end - wall_start, 3),
        ari=round(float(adjusted_rand_score(group_of, labels)), 4),
        peak_gib=round(_peak_gib(), 2),
        of_which_data_gib=round(data_gib, 2),
    )


def plain(matrix: "csr_array", num_groups: int) -> "np.ndarray":
    """Randomised SVD of the sparse predictions, unit rows, MiniBatchKMeans: labels [C]."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd

    _, singular, right = randomized_svd(matrix, 64, random_state=0)
    columns = normalize((singular[:, None] * right).T)
    return MiniBatchKMeans(num_groups, batch_size=4096, random_state=0).fit_predict(columns)


def compare(sizes: Sizes, rounds: int, run: Callable[[Case], Row]) -> dict[str, object]:
    """Run all cases of these sizes, print what they come to, and return it."""
    seconds = defaultdict(list)
    rows = []

    def run_all(methods: list[tuple[str, bool]]) -> None:
        for classes, per_class in sizes.cases:
            for method, refine in methods:
                row = run(Case(classes, sizes.groups, per_class, method, refine))
                rows.append(asdict(row))
                seconds[row.method, classes, per_class].append(row.seconds)

    for _ in range(rounds):
        run_all([("plain", False), ("minibatch", False)])
    run_all([("kmeans", False), ("kmeans", True)])
    ratios = [
        _ratio(case, seconds["minibatch", *case], seconds["plain", *case]) for case in sizes.cases
    ]
    exponents = {}
    for method in ("plain", "minibatch", "kmeans", "kmeans + refine"):
        base, more_samples, more_classes = (median(seconds[method, *case]) for case in sizes.cases)
        exponents[method] = {
            "classes": _exponent(more_classes / base, sizes.large / sizes.small),
            "samples": _exponent(more_samples / base, 4),
        }
        print(
            f"# {method}: seconds ~ classes^{exponents[method]['classes']:.2f} "
            f"(samples in proportion), samples^{exponents[method]['samples']:.2f}"
        )
    return {"cases": rows, "minibatch_over_plain": ratios, "exponents": exponents}


def gather(num_classes: int, num_groups: int, per_class: int) -> list[dict[str, object]]:
    """The exact covariance and the largest predictions: seconds to gather, and the groups of each.

    captured: share of the errors of other predictions of the same classes, and by chance.
    """
    from sklearn.metrics import adjusted_rand_score

    from clustering import PredictionStatistics, captured_confusion, group_classes
    from clustering.statistics import EXPECTED_TOP_K

    planted = _planted()
    others = PredictionStatistics(num_classes, top_k=10)
    indices, values, labels, group_of = planted.planted_predictions(
        num_classes, num_groups, per_class, seed=1, groups_seed=0
    )
    others.update(indices, values, labels)
    rows = []
    for top_k in (None, EXPECTED_TOP_K):
        statistics = PredictionStatistics(num_classes, top_k=top_k)
        gathering = 0.0
        for p in _dense_batches(num_classes, num_groups, per_class):
            start = time.process_time()
            statistics.update(p)
            gathering += time.process_time() - start
        for method in ("kmeans", "correlation"):
            start = time.process_time()
            groups = group_classes(statistics, num_groups, method)
            seconds = time.process_time() - start
            share, chance = captured_confusion(groups, others.confusion)
            ari = adjusted_rand_score(group_of, planted.labels_of(groups))
            row = {"classes": num_classes, "kept": top_k or "all", "method": method}
            row |= {"gather_s": round(gathering, 2), "group_s": round(seconds, 2)}
            row |= {"captured": round(share, 4), "chance": round(chance, 4), "ari": round(ari, 4)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def _dense_batches(
    num_classes: int, num_groups: int, per_class: int
) -> "Iterator[NDArray[np.float32]]":
    """Planted predictions of every class, [512, C]: what the named ones leave, unevenly."""
    import numpy as np

    indices, values, _, _ = _planted().planted_predictions(num_classes, num_groups, per_class)
    rng = np.random.default_rng(0)
    for start in range(0, len(indices), 512):
        index, value = indices[start : start + 512], values[start : start + 512]
        p = rng.exponential(size=(len(index), num_classes)).astype(np.float32) ** 2
        p *= (1 - value.sum(axis=1, keepdims=True)) / p.sum(axis=1, keepdims=True)
        rows, columns = np.nonzero(index >= 0)
        p[rows, index[rows, columns]] += value[rows, columns]
        yield p / p.sum(axis=1, keepdims=True)


def _ratio(
    case: tuple[int, int], ours: list[float], scikit_learns: list[float]
) -> dict[str, float]:
    classes, per_class = case
    ratios = sorted(a / b for a, b in zip(ours, scikit_learns, strict=True))
    middle, lowest, highest = median(ratios), ratios[0], ratios[-1]
    print(
        f"# {classes:,} classes, {per_class} samples each: minibatch / plain = {middle:.2f} "
        f"({lowest:.2f} to {highest:.2f}, {len(ratios)} rounds)"
    )
    return {
        "classes": classes,
        "per_class": per_class,
        "median": round(middle, 3),
        "lowest": round(lowest, 3),
        "highest": round(highest, 3),
    }


def _exponent(ratio_of_seconds: float, ratio_of_sizes: float) -> float:
    return round(math.log(ratio_of_seconds) / math.log(ratio_of_sizes), 3)


def _here(case: Case) -> Row:
    row = measure(case)
    print(json.dumps(asdict(row)), flush=True)
    return row


def _in_a_process(case: Case) -> Row:
    command = [sys.executable, "-m", "benchmarks.clustering", "--case", json.dumps(case)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(result.stdout, end="", flush=True)
    return Row(**json.loads(result.stdout))


def _matrix(indices: "np.ndarray", values: "np.ndarray", num_classes: int) -> "csr_array":
    import numpy as np
    from scipy.sparse import csr_array

    rows, columns = np.nonzero(indices >= 0)
    cells = values[rows, columns], (rows, indices[rows, columns])
    return csr_array(cells, shape=(len(indices), num_classes))


def _planted() -> ModuleType:
    path = Path(__file__).parents[1] / "tests" / "clustering" / "planted.py"
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--million",
        action="store_true",
        help="1,000,000 classes, 1,000 groups, 3 samples a class, and nothing else",
    )
    form.add_argument(
        "--gather",
        action="store_true",
        help="5,200 classes, 88 groups, 4 samples a class: exact covariance or largest predictions",
    )
    form.add_argument(
        "--quick",
        action="store_true",
        help="800 and 3,200 classes instead, 16 groups, one round in this process",
    )
    form.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = _options()
    if options.case:
        _here(Case(*options.case))
        return
    machine = {
        "cpus": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "python": sys.version.split()[0],
    }
    print(f"# {machine}, one seed")
    if options.million:
        cases = [Case(1_000_000, 1_000, 3, "minibatch", refine) for refine in (False, True)]
        results = {"cases": [asdict(_in_a_process(case)) for case in cases]}
    elif options.gather:
        results = {"gathered": gather(5_200, 88, 4)}
    elif options.quick:
        results = compare(QUICK, 1, _here) | {"gathered": gather(400, 8, 4)}
    else:
        results = compare(FULL, options.rounds, _in_a_process)
    print(json.dumps({"machine": machine, **results}))


if __name__ == "__main__":
    main()
