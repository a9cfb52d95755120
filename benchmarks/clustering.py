"""Planted groups of confusable classes: how well, how fast, in how much memory, beside a plain scikit-learn script.

    OMP_NUM_THREADS=1 python -m benchmarks.clustering                      15,000 and 100,000 classes, a few minutes
    OMP_NUM_THREADS=2 python -m benchmarks.clustering --million            also 1,000,000 classes in 1,000 groups

Each line is one process of its own, so that its peak memory is its own.  Exponents: log time over log
classes, between the two sizes with 300 groups and 10 samples a class, and over log samples at 15,000 classes.
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
from pathlib import Path

BATCH = 8192


def measure(num_classes: int, num_groups: int, per_class: int, method: str, refine: bool) -> dict:
    """Seconds, adjusted Rand index and peak GiB of one case; method "plain" is scikit-learn alone."""
    from sklearn.metrics import adjusted_rand_score

    from clustering import PredictionStatistics, group_classes

    planted = _planted()
    indices, values, _, group_of = planted.planted_predictions(num_classes, num_groups, per_class)
    base = _peak_gib()
    started = time.perf_counter()
    if method == "plain":
        matrix = _matrix(indices, values, num_classes)
        gathered = time.perf_counter()
        found = plain(matrix, num_groups)
    else:
        statistics = PredictionStatistics(num_classes, top_k=indices.shape[1])
        for start in range(0, len(indices), BATCH):
            statistics.update(indices[start : start + BATCH], values[start : start + BATCH])
        gathered = time.perf_counter()
        found = planted.labels_of(group_classes(statistics, num_groups, method, refine=refine))
    ended = time.perf_counter()
    return {
        "classes": num_classes,
        "groups": num_groups,
        "per_class": per_class,
        "method": method + (" + refine" if refine else ""),
        "gather_s": round(gathered - started, 2),
        "group_s": round(ended - gathered, 2),
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
    return csr_array((values[rows, columns], (rows, indices[rows, columns])), shape=(len(indices), num_classes))


def _planted():
    path = Path(__file__).parents[1] / "tests" / "clustering" / "planted.py"
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--million", action="store_true", help="also 1,000,000 classes, 1,000 groups, 3 samples a class"
    )
    parser.add_argument("--quick", action="store_true", help="1,500 and 6,000 classes instead, 30 groups")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*options.case)))
        return
    small, large, groups = (1_500, 6_000, 30) if options.quick else (15_000, 100_000, 300)
    cases = [
        [classes, groups, per_class, method, refine]
        for classes, per_class in ((small, 10), (small, 40), (large, 10))
        for method, refine in (("plain", False), ("minibatch", False), ("kmeans", False), ("kmeans", True))
    ]
    if options.million:
        cases += [[1_000_000, 1_000, 3, "plain", False], [1_000_000, 1_000, 3, "minibatch", False]]
        cases += [[1_000_000, 1_000, 3, "minibatch", True]]
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    print(f"# {os.cpu_count()} CPUs, OMP_NUM_THREADS={threads}, one seed, Python {sys.version.split()[0]}")
    rows = []
    for case in cases:
        command = [sys.executable, "-m", "benchmarks.clustering", "--case", json.dumps(case)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(json.dumps(rows[-1]), flush=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        s = {
            (row["classes"], row["per_class"]): row["gather_s"] + row["group_s"]
            for row in rows
            if row["method"] == method
        }
        if {(small, 10), (small, 40), (large, 10)} <= s.keys():
            by_classes = math.log(s[large, 10] / s[small, 10]) / math.log(large / small)
            by_samples = math.log(s[small, 40] / s[small, 10]) / math.log(4)
            print(f"# {method}: seconds ~ classes^{by_classes:.2f} (samples in proportion), samples^{by_samples:.2f}")


if __name__ == "__main__":
    main()
