"""What fsync and checksums cost a run: the demo with both, and with neither, in turn.

    python -m benchmarks.durability --pairs 10
        pairs of `referral demo --quick`, the first of a pair by turns
    python -m benchmarks.durability --account
        one whole `referral demo`: seconds inside fsync, and inside checksums

`--set` goes to the demo.  A line of JSON has of every pair the ratio of CPU seconds and of
seconds, with both over with neither.  It has the median, and the interval that holds it with at
least 95 % probability, by the ranks of the pairs.

The product has no switch for it.  Every Python of a run finds a sitecustomize.py of this program
first, which puts something else in the place of os.fsync and of what networks.checksums computes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORM = "REFERRAL_BENCHMARK_DURABILITY"  # "both", "neither", "timed:FILE"
# The toy's shape: as many processes as the quick demo has, and hardly any work in them.
QUICK = (
    "train.steps=6", "train.validate_every=6", "clusters.num_groups=2", "specialists.steps=2",
    "specialists.per_job=2", "students.main.steps=2", "students.wide.steps=2",
    "controls.enabled=false",
)  # fmt: skip
SITECUSTOMIZE = '''
import os, sys, time, json, atexit
from importlib.machinery import PathFinder

FORM = os.environ.get("REFERRAL_BENCHMARK_DURABILITY", "both")
SPENT = {"fsync": [0, 0.0], "checksums": [0, 0.0]}


def timed(function, key):
    def inside(*arguments, **options):
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            SPENT[key][0] += 1
            SPENT[key][1] += time.perf_counter() - began
    return inside


def note():
    content = json.dumps(SPENT) + "\\n"
    file = os.open(FORM.partition(":")[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, content.encode())
    os.close(file)


class Nothing:
    def update(self, content):
        pass

    def hexdigest(self):
        return "0" * 32


def of_checksums(module):
    """The other form of what networks.checksums computes."""
    if FORM == "neither":
        module.xxh3_128 = Nothing
        module.entry_of = lambda path: {"bytes": os.stat(path).st_size, "xxh3_128": "0" * 32}
        module.digest_of = lambda parts: "0" * 32
        module.differs = lambda path, entry, content=None: ""
        module.check = lambda *paths: None
        return
    for name in ("entries_of", "digest_of", "differs"):
        setattr(module, name, timed(getattr(module, name), "checksums"))
    update = module.Hashing.write
    hashed = timed(lambda state, content: state.update(content), "checksums")

    def write(self, content):
        hashed(self._state, content)
        self.bytes += memoryview(content).nbytes
        return self.file.write(content)

    module.Hashing.write = write


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "networks.checksums":
            return None
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            of_checksums(module)

        spec.loader.exec_module = exec_module
        return spec


if FORM == "neither":
    os.fsync = lambda descriptor: None
elif FORM.startswith("timed:"):
    os.fsync = timed(os.fsync, "fsync")
    atexit.register(note)
    os._exit = lambda code, leave=os._exit: (note(), leave(code))  # the trainer's way to end
if FORM != "both":
    sys.meta_path.insert(0, Finder)
'''


def environment(place: Path, form: str) -> dict[str, str]:
    """Of a process whose fsync and checksums have that form."""
    (place / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {
        **os.environ,
        FORM: form,
        "PYTHONPATH": os.pathsep.join([str(place), str(ROOT)]),
        "XDG_STATE_HOME": str(place / "state"),
    }


def demo(place: Path, form: str, options: list[str]) -> dict[str, float]:
    """Seconds of one demo, and CPU seconds of all its processes."""
    with tempfile.TemporaryDirectory(dir=place) as directory:
        command = [sys.executable, "-P", "-m", "launch", "demo", *options]
        before, began = _cpu_of_children(), time.perf_counter()
        done = subprocess.run(
            [*command, "--run", f"{directory}/run"],
            env=environment(place, form),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        seconds = time.perf_counter() - began
        return {"cpu_s": _cpu_of_children() - before, "s": seconds}


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def in_pairs(place: Path, pairs: int, options: list[str]) -> dict:
    measured: dict[str, list[dict[str, float]]] = {"both": [], "neither": []}
    for pair in range(pairs):
        forms = ["both", "neither"]
        for form in forms if pair % 2 == 0 else reversed(forms):
            measured[form].append(demo(place, form, options))
        print(json.dumps({form: runs[-1] for form, runs in measured.items()}), file=sys.stderr)
    return {"pairs": pairs, **{key: compared(measured, key) for key in ("cpu_s", "s")}}


def compared(measured: dict[str, list[dict[str, float]]], key: str) -> dict:
    """The medians of both forms, and the ratio of a pair: its median and interval."""
    both, neither = ([run[key] for run in measured[form]] for form in ("both", "neither"))
    ratios = [one / other for one, other in zip(both, neither, strict=True)]
    low, high = interval(ratios)
    return {
        "both": round(statistics.median(both), 2),
        "neither": round(statistics.median(neither), 2),
        "ratio": round(statistics.median(ratios), 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """The narrowest interval of ranks, alike at both ends, that holds the median so surely.

    Of n values the median is below the r-th smallest with the probability of fewer than r heads in
    n tosses.  Too few values for the level give the smallest and the largest.
    """
    ordered, index, below = sorted(values), 0, 0.0
    for rank in range((len(values) + 1) // 2):
        below += math.comb(len(values), rank) / 2 ** len(values)
        if 2 * below > 1 - level:
            break
        index = rank
    return ordered[index], ordered[-1 - index]


def accounted(place: Path, options: list[str]) -> dict:
    """Seconds of one demo inside fsync and inside checksums, all processes together."""
    notes = place / "spent.jsonl"
    run = demo(place, f"timed:{notes}", options)
    total = {"processes": 0, "fsync": [0, 0.0], "checksums": [0, 0.0]}
    for line in notes.read_text().splitlines():
        total["processes"] += 1
        for key, (calls, seconds) in json.loads(line).items():
            total[key][0] += calls
            total[key][1] += seconds
    inside = {
        key: {
            "calls": total[key][0],
            "s": round(total[key][1], 3),
            "share_of_cpu": round(total[key][1] / run["cpu_s"], 5),
        }
        for key in ("fsync", "checksums")
    }
    of_run = {key: round(value, 1) for key, value in run.items()}
    return {"demo": of_run, "processes": total["processes"], **inside}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--account", action="store_true", help="count one whole demo's seconds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--place", type=Path, help="where the runs lie [the temporary directory]")
    parser.add_argument("--quick", action="store_true", help="one pair, of next to no steps")
    given = parser.parse_args()
    overrides = [*(QUICK if given.quick else ()), *given.set]
    options = [word for override in overrides for word in ("--set", override)]
    with tempfile.TemporaryDirectory(dir=given.place) as directory:
        place = Path(directory)
        if given.quick:
            given.pairs = 1
        if given.account and not given.quick:
            measured = accounted(place, options)
        elif given.account:
            measured = accounted(place, ["--quick", *options])
        else:
            measured = in_pairs(place, given.pairs, ["--quick", *options])
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
