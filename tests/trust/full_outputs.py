"""Write exports, tables, evaluations and reports to disks that are too small for them.

    python tests/trust/full_outputs.py [TRIALS] [--first NUMBER]

Each command ends in one line with the path and what is free.  Nothing half written has the name of
an output then, and nothing hidden is left.  With room the same command goes through.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from disks import FULL, GOLDEN, used_kib  # noqa: E402
from older import by_trainer  # noqa: E402
from small import (  # noqa: E402
    Asked,
    Count,
    asked,
    finished,
    hidden,
    in_child,
    run_at,
    small_config,
    workshop,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from filesystems import in_memory, resize, why_not  # noqa: E402

from pipeline.config import Config  # noqa: E402
from pipeline.failures import answer  # noqa: E402

Command = Callable[[Path, Config, Path], int]
# Command -> (what it does with RUN, its config and the disk, what it writes there, KiB enough)
WRITERS: dict[str, tuple[Command, str, int]] = {
    "export": (lambda run, c, disk: exported(run, disk / "out"), "out", 150),
    "csv": (lambda run, c, disk: predicted(run, c, disk / "out.csv"), "out.csv", 40),
    "jsonl": (lambda run, c, disk: predicted(run, c, disk / "out.jsonl"), "out.jsonl", 80),
    "evaluate": (lambda run, c, disk: evaluated(run, c, disk / "out.csv"), "out.csv", 40),
    "report": (lambda run, c, disk: by_trainer(["report", "--run", str(disk / "run")]), "", 0),
}  # fmt: skip


def exported(run: Path, to: Path) -> int:
    return by_trainer(["export", str(run), "--to", str(to)])


def predicted(run: Path, config: Config, to: Path) -> int:
    return by_trainer(["predict", str(run), config.data.train, "--to", str(to)])


def evaluated(run: Path, config: Config, to: Path) -> int:
    return by_trainer(["evaluate-data", str(run), config.data.test, "--out", str(to)])


def main(given: Asked) -> int:
    count = Count("outputs to full disks", given)
    if reason := why_not("tmpfs"):
        print(f"{count.name}: skipped: {reason}")
        return 0
    with workshop() as (place, data):
        config = small_config(data)
        finished(place / "run", config)
        for trial in given.trials:
            judge(count, trial, place / "run", config)
    return count.report()


def judge(count: Count, trial: int, run: Path, config: Config) -> None:
    name = list(WRITERS)[trial % len(WRITERS)]
    writer, out, enough = WRITERS[name]
    share = trial // len(WRITERS) * GOLDEN % 1
    with in_memory(1 << 16) as disk:
        if name == "report":  # it writes into its RUN
            shutil.copytree(run, disk / "run", symlinks=True)
            run_at(disk / "run", config).report.clear()
            enough = 120
        kib = used_kib(disk) + max(4, int(share * enough))
        resize(disk, kib)
        work = partial(answer, partial(writer, run, config, disk), [disk])
        ended = in_child(work)
        end, said = "went on", ended.text
        if ended.code:
            end = "one line"
            is_left = bool(out) and (disk / out).exists()
            if ended.is_traceback:
                end = "traceback"
            elif is_left or hidden(disk):
                end, said = "left behind", f"{said}{hidden(disk)} {is_left}"
            elif not any(words in said for words in FULL) or str(disk) not in said:
                end = "stuck"
            resize(disk, 1 << 16)
            again = in_child(work)
            if again.code:
                end, said = "stuck", said + again.text
        elif out and not (disk / out).exists():
            end = "silent difference"
        count.add(end, f"{trial}: {name}, {kib} KiB", said)


if __name__ == "__main__":
    sys.exit(main(asked(40)))
