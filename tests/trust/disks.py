"""Run on disks that are too small, then make room and let the plain command go on.

    python tests/trust/disks.py [SIZES] [--first NUMBER]

The disks are tmpfs of so many KiB, from next to nothing to what the run takes: each size falls into
the widest gap between those before it.  A full one is one
line with the path and what is free, of the command and of every stage, and nothing hidden is left
once the run is done.  Only root may mount: without, all are skipped with one line.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from small import (  # noqa: E402
    Asked,
    Count,
    Outcome,
    asked,
    command,
    finished,
    in_child,
    judge,
    small_config,
    workshop,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from filesystems import in_memory, resize, why_not  # noqa: E402

from pipeline.config import save_config  # noqa: E402

LEAST_KIB = 16
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, fall so
EVERY = 8  # of these one by `referral run` itself, its jobs in processes of their own

FULL = ("is full", "No space left")  # what an error says of a full disk


def main(given: Asked) -> int:
    count = Count("disk sizes", given)
    if reason := why_not("tmpfs"):
        print(f"{count.name}: skipped: {reason}")
        return 0
    with workshop() as (place, data):
        config = small_config(data)
        expected = finished(place / "clean", config)
        save_config(config, place / "config.toml")
        enough = used_kib(place / "clean") * 5 // 4
        for trial in given.trials:
            kib = LEAST_KIB + int((enough - LEAST_KIB) * (trial * GOLDEN % 1))
            with in_memory(kib) as disk:
                root = disk / "run"
                if trial % EVERY == EVERY // 2:
                    start = partial(referral, root, place / "config.toml")
                else:
                    start = partial(in_child, partial(command, root, config))
                outcome = start()
                resize(disk, 8 * enough)
                said = any(words in outcome.text for words in FULL)
                if outcome.code and not said:
                    count.add("stuck", f"{trial}: {kib} KiB", outcome.text)
                    continue
                judge(count, f"{trial}: {kib} KiB", outcome, root, expected, partial(again, start))
    return count.report()


def again(start) -> Outcome:
    return start()


def referral(root: Path, config: Path) -> Outcome:
    """The command itself."""
    command = [sys.executable, "-P", "-m", "launch", "run", str(config), "--run", str(root)]
    ended = subprocess.run(command, capture_output=True, text=True)
    return Outcome(ended.returncode, ended.stdout + ended.stderr)


def used_kib(root: Path) -> int:
    used = subprocess.run(["du", "-sk", str(root)], capture_output=True, text=True, check=True)
    return int(used.stdout.split()[0])


if __name__ == "__main__":
    sys.exit(main(asked(32)))
