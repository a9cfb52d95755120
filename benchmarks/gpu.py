"""What a GPU does with this program, as one table: the `gpu` tests, and samples per second.

    make gpu                             one GPU, less than 10 minutes
    python -P -m benchmarks.gpu --quick  one short training on a CPU: does it run at all?

First come the tests that are marked gpu (tests/gpu): one tiny run with every stage, engine and
precision, equal to the CPU's.  Then benchmarks.training: ResNet-50 and ViT-B/16 by our loop beside
a bare one.  The exit code is 1 where a test failed, or a ratio is below its bar.  The last line is
the table as a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TESTS = ("tests/gpu", "tests/ensemble/test_combine.py")
TRAINING = ["--rounds", "3", "--steps", "40", "--warm", "10", "--shapes", "resnet50", "vit"]


class Row(NamedTuple):
    """what: a test, or a shape and an engine."""

    what: str
    result: str
    seconds: float | None = None
    passed: bool = True


def test_rows(report: Path) -> list[Row]:
    """Of a report in JUnit's form, in the order in which tests ran."""
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case} & {"failure", "error", "skipped"}
        result = outcomes.pop() if outcomes else "passed"
        passed = result in ("passed", "skipped")
        rows.append(Row(case.attrib["name"], result, float(case.attrib["time"]), passed))
    return rows


def training_row(row: dict) -> Row:
    """Of what benchmarks.training prints."""
    rates, memory = row["samples_per_s"], row["peak_gib"]
    words = [f"{rates['ours']:,.0f} samples/s, {row['ratio']:.3f} of a bare loop's"]
    words += [f"{each} {value:.2f} GiB" for each, value in memory.items()]
    if "mfu" in row:
        words.append(f"{100 * row['mfu']['ours']:.0f} % of the card's FLOPs")
    return Row(
        f"{row['shape']}, {row['engine']}", ", ".join(words), passed=row["ratio"] >= row["bar"]
    )


def run_tests(device: str) -> list[Row]:
    environment = {**os.environ, "REFERRAL_GPU_SUITE_DEVICE": device}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
        subprocess.run([*command, *TESTS], env=environment, cwd=ROOT)
        return test_rows(report)


def run_training(device: str, quick: bool) -> list[Row]:
    command = [sys.executable, "-P", "-m", "benchmarks.training", "--device", device]
    command += ["--quick"] if quick else TRAINING
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [training_row(row) for row in json.loads(output.splitlines()[-1])["rows"]]


def table(rows: list[Row]) -> str:
    width = max(len(row.what) for row in rows)
    lines = []
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.1f} s"
        mark = "" if row.passed else "  <- not as it should be"
        lines.append(f"{row.what:<{width}}  {seconds:>9}  {row.result}{mark}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="one short training on a CPU")
    options = parser.parse_args()
    if options.quick:
        rows = run_training("cpu", quick=True)
    else:
        rows = run_tests(options.device) + run_training(options.device, quick=False)
    print(table(rows), flush=True)
    print(json.dumps({"rows": [row._asdict() for row in rows]}))
    return 0 if options.quick or all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
