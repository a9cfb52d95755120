"""Planted groups of confusable classes: how well, how fast, in how much memory, beside a plain scikit-learn script.

    OMP_NUM_THREADS=1 python -m benchmarks.clustering                      15,000 and 100,000 classes, some 8 minutes
    OMP_NUM_THREADS=1 python -m benchmarks.clustering --million            1,000,000 classes in 1,000 groups, 4 minutes

Each line is one process of its own, so that its peak memory is its own.  "plain" and "minibatch", not refined, take
turns for --rounds rounds; their ratio is the median of the rounds'.  Seconds are the processor's (one thread), which
other work on the machine changes less than the clock's, wall_s, which stand beside them.  Exponents: log seconds over
log classes, between the two sizes with 300 groups and 10 samples a class, and over log samples at 15,000 classes.
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
from pathlib import Path
from statistics import median

BATCH = 8192


def measure(num_classes: int, num_groups: int, per_class: int, method: str, refine: bool) -> dict:
    """Processor and wall seconds, adjusted Rand index, peak GiB of one case; method "plain" is scikit-learn alone."""
    # All that either side imports, before the clock starts.
    import scipy.cluster.hierarchy  # noqa: F401
    import sklearn.cluster  # noqa: F401
    from sklearn.metrics import adjusted_rand_score

    from clustering import PredictionStatistics, group_classes

    planted = _planted()
    indices, values, _, group_of = planted.planted_predictions(num_classes, num_groups, per_class)
    base = _peak_gib()
    wall, started = time.perf_counter(), time.process_time()
    if method == "plain":
        matrix = _matrix(indices, values, num_classes)
        gathered = time.process_time()
        found = plain(matrix, num_groups)
    else:
        statistics = PredictionStatistics(num_classes, top_k=indices.shape[1])
        for start in range(0, len(indices), BATCH):
            statistics.update(indices[start : start + BATCH], values[start : start + BATCH])
        gathered = time.process_time()
        found = planted.labels_of(group_classes(statistics, num_groups, method, refine=refine))
    ended, wall = time.process_time(), time.perf_counter() - wall
    return {
        "classes": num_classes,
        "groups": num_groups,
        "per_class": per_class,
        "method": method + (" + refine" if refine else ""),
        "gather_s": round(gathered - started, 2),
        "group_s": round(ended - gathered, 2),
        "wall_s": round(wall, 2),
        "ari": round(float(adjusted_rand_score(group_of, found)), 4),
        "peak_gib": round(_peak_gib(), 2),
        "of_which_data_gib": round(base, 2),
    }


def plain(matrix, num_groups: int):
    """What one would write in a minute: randomised SVD of the sparse predictions, unit rows, MiniBatchKMeans."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd

    _, singular, right = randomized_svd(matrix, 64, random_state=0)
    return MiniBatchKMeans(num_groups, batch_size=4096, random_state=0).fit_predict(
        normalize((singular[:, None] * right).T)
    )


def _matrix(indices, values, num_classes: int):
    import numpy as np
    from scipy.sparse import csr_array

    rows, columns = np.nonzero(indices >= 0)
    return csr_array(
        (values[rows, columns], (rows, indices[rows, columns])), shape=(len(indices), num_classes)
    )


def _planted():
    path = Path(__file__).parents[1] / "tests" / "clustering" / "planted.py"
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--million",
        action="store_true",
        help="1,000,000 classes, 1,000 groups, 3 samples a class, and nothing else",
    )
    parser.add_argument(
        "--quick", action="store_true", help="1,500 and 6,000 classes instead, 30 groups"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*options.case)))
        return
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    print(
        f"# {os.cpu_count()} CPUs, OMP_NUM_THREADS={threads}, one seed, Python {sys.version.split()[0]}"
    )
    if options.million:
        for refine in (False, True):
            _run(1_000_000, 1_000, 3, "minibatch", refine)
        return
    small, large, groups = (1_500, 6_000, 30) if options.quick else (15_000, 100_000, 300)
    seconds = defaultdict(list)
    for _ in range(options.rounds):
        for classes, per_class in ((small, 10), (small, 40), (large, 10)):
            for method in ("plain", "minibatch"):
                row = _run(classes, groups, per_class, method, False)
                seconds[method, classes, per_class].append(row["gather_s"] + row["group_s"])
    for classes, per_class in ((small, 10), (small, 40), (large, 10)):
        for method, refine in (("kmeans", False), ("kmeans", True)):
            row = _run(classes, groups, per_class, method, refine)
            seconds[row["method"], classes, per_class].append(row["gather_s"] + row["group_s"])
    for classes, per_class in ((small, 10), (small, 40), (large, 10)):
        ours, plain_s = (
            seconds["minibatch", classes, per_class],
            seconds["plain", classes, per_class],
        )
        ratios = sorted(a / b for a, b in zip(ours, plain_s, strict=True))
        print(
            f"# {classes:,} classes, {per_class} samples each: minibatch / plain = {median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} rounds)"
        )
    for method in ("plain", "minibatch", "kmeans", "kmeans + refine"):
        base, more, larger = (
            median(seconds[method, *size]) for size in ((small, 10), (small, 40), (large, 10))
        )
        by_classes, by_samples = (
            math.log(larger / base) / math.log(large / small),
            math.log(more / base) / math.log(4),
        )
        print(
            f"# {method}: seconds ~ classes^{by_classes:.2f} (samples in proportion), samples^{by_samples:.2f}"
        )


def _run(*case) -> dict:
    command = [sys.executable, "-m", "benchmarks.clustering", "--case", json.dumps(case)]
    row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
