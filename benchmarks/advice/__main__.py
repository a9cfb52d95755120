"""Which lever pays after a generalist, and what short trainings of each say of that beforehand.

    OMP_NUM_THREADS=1 python -m benchmarks.advice [--sets NAME ...] [--seeds 0 1]
        [--to runs/advice]
        [--budgets .1 .2 .3] [--write]          --write: the tables into docs/advise.md
    python -m benchmarks.advice --table         what TO holds, and nothing else
    python -m benchmarks.advice --set fashion=DIR --set mine=FILE.npz  these sets of yours
    python -m benchmarks.advice --quick  scikit-learn's digits, in seconds, no result

Ten small sets (benchmarks.advice.sets), each with a generalist of some 20 seconds on one core.  Of
each set and seed every lever is paid for in full, and the networks that it needs are trained for
2, 4.5, 7 and 15 % of the generalist's steps besides:

    train_on            the generalist, for as many steps again from a third of the peak
                        rate
    train_on_full_rate  the same from the peak
    wider               from scratch, twice the multiplications
    grown               the generalist, widened to that without another answer, half the
                        steps
    average             the plain mean with a second generalist
    average_fitted, geometric, shortlist    the same two, joined by a weight that is
                                            fitted on val
    second_alone        the second generalist by itself: what chance does
    average_student     a fresh network of the generalist's size, taught by the plain mean
    average_student_on  the same, but it starts as the generalist
    copies, branches, rerank    the runs of that name; only sets of 500 classes have the
                                last

Gains are points of top-1 over the generalist, with the paired standard error. "training" is a share
of the generalist's, counted in multiplications.  What is done is not done again. Every set and seed
adds a line to TO/truth.jsonl.

PATH of --set NAME=PATH is whatever `referral init` reads: a directory per class (Tiny ImageNet's
train), idx files (Fashion-MNIST's), csv tables, npz with x and y, or shards.  Its networks and
specialists are those that `referral init` proposes, the same on every machine. Name the set again
with every later command.

Then `referral advise` is asked about each of these generalists, once for each of --budgets, and
what it predicts and advises is held against what was pulled.  Its pilots are kept below TO/asked,
and its predictions made anew from them by the rules of today.  The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from benchmarks.papers import lab

from .account import in_numbers, report
from .asking import advise, kept_in
from .lines import line_of
from .own_sets import add_set, name_and_path
from .sets import QUICK, REAL, SETS
from .table import read_lines, short_table_of, table_of
from .truth import make
from .verdicts import Judged, judge

PAGE = lab.ROOT / "docs" / "advise.md"
OPENS, CLOSES = "<!-- benchmarks.advice -->", "<!-- /benchmarks.advice -->"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, metavar="NAME", help=f"of {', '.join(REAL)} (all)"
    )
    parser.add_argument(
        "--set",
        dest="own",
        type=name_and_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a set of yours, see above; without --sets yours alone",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--to", type=Path, default=Path("runs/advice"), help="(runs/advice)")
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="*",
        default=[0.3],
        help="of the pilots, shares of the generalist's training (.3)",
    )
    parser.add_argument("--asked", type=Path, help="where advice is kept (TO/asked)")
    parser.add_argument("--write", action="store_true", help="the verdict into docs/advise.md")
    parser.add_argument("--table", action="store_true", help="print what TO holds alone")
    parser.add_argument(
        "--again",
        action="store_true",
        help="write TO/truth.jsonl's lines anew, and train what they lack",
    )
    parser.add_argument("--quick", action="store_true", help="digits, below TO/quick")
    given = parser.parse_args(words)
    given.sets = given.sets or ([] if given.own else REAL)
    if given.quick:
        given.to, given.sets, given.seeds = given.to / "quick", [QUICK], [0]
        shutil.rmtree(given.to, ignore_errors=True)
    given.to.mkdir(parents=True, exist_ok=True)
    for name, path in given.own:
        add_set(name, path, given.to)
        given.sets = [*given.sets, name]
    file, asked = given.to / "truth.jsonl", given.asked or given.to / "asked"
    if given.again:
        write_again(file)
    elif not given.table:
        for seed in given.seeds:
            for name in given.sets:
                add_line(file, name, seed, given.to)
    lines = read_lines(file)
    if not given.table:
        ask(lines, given, asked)
    judged = judged_in(lines, given, asked)
    print(f"{table_of(lines)}\n\n{short_table_of(lines)}")
    measured = {"lines": lines}
    if judged:
        text = f"{report(judged)}\n\n{conditions(judged, lines)}"
        print(f"\n{text}")
        measured |= in_numbers(judged)
        if given.write and not given.quick:
            write_between(PAGE, text)
    print(json.dumps(lab.without_nan(measured | {"conditions": lab.machine()})))


def chosen(lines: list[dict], given: argparse.Namespace) -> list[dict]:
    """Those of the sets and seeds that are asked about."""
    return [line for line in lines if line["set"] in given.sets and line["seed"] in given.seeds]


def ask(lines: list[dict], given: argparse.Namespace, asked: Path) -> None:
    for budget in given.budgets:
        for line in chosen(lines, given):
            advise(line["set"], line["seed"], budget, root_of(line, given.to), asked)


def judged_in(lines: list[dict], given: argparse.Namespace, asked: Path) -> list[Judged]:
    """Of every advice that is there."""
    return [
        judge(line, budget, kept, root_of(line, given.to))
        for line in chosen(lines, given)
        for budget in given.budgets
        if (kept := kept_in(asked, line["set"], line["seed"], budget)).exists()
    ]


def root_of(line: dict, to: Path) -> Path:
    return to / line["set"] / f"seed-{line['seed']}"


def conditions(judged: list[Judged], lines: list[dict]) -> str:
    """Under the tables."""
    tested = [line["generalist"]["test_n"] for line in lines]
    sets = len({row.name for row in judged})
    budgets = " ".join(f"{budget:g}" for budget in sorted({row.budget for row in judged}))
    seeds = sorted({row.seed for row in judged})
    words = " ".join(map(str, seeds))
    command = f"python -m benchmarks.advice --seeds {words} --budgets {budgets} --write"
    same = sum(row.same_families for row in judged)
    return (
        f"{sets} sets, {len(judged)} advices, {min(tested):,} to {max(tested):,} test examples. "
        f"Today's rules send the families on that were sent on then in {same} of {len(judged)}. "
        f"{lab.conditions(seeds, command)}"
    )


def write_between(page: Path, text: str) -> None:
    """Replace what stands between the page's two marks."""
    before, opened, rest = page.read_text(encoding="utf-8").partition(OPENS)
    _, closed, after = rest.partition(CLOSES)
    assert opened and closed, f"{page} has no {OPENS} and {CLOSES}"
    page.write_text(f"{before}{OPENS}\n{text}\n{CLOSES}{after}", encoding="utf-8")


def add_line(file: Path, name: str, seed: int, to: Path) -> None:
    """Train what is missing of a set and seed, and append its line."""
    if any((line["set"], line["seed"]) == (name, seed) for line in read_lines(file)):
        return
    began = time.perf_counter()
    print(f"{name}, seed {seed}", flush=True)
    append(file, line_of(name, seed, make(name, seed, to)))
    print(f"{name}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)


def append(file: Path, line: dict) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(lab.without_nan(line)) + "\n")


def write_again(file: Path) -> None:
    """The same lines, of the same sets and seeds."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    for line in read_lines(file):
        name, seed = line["set"], line["seed"]
        append(unfinished, line_of(name, seed, make(name, seed, file.parent)))
    unfinished.replace(file)


if __name__ == "__main__":
    main()
