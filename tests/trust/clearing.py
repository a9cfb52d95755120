"""Kill `referral run --force` at single file operations while it clears what another config made.

    python tests/trust/clearing.py [KILLS_PER_FILE_SYSTEM] [--first NUMBER] [--seed SEED]

On ext4, XFS and btrfs in images, which list names in orders of their own.  The plain command then
ends with the figures of a clean run of that config, or says --force, which does.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from small import (  # noqa: E402
    Asked,
    Count,
    asked,
    command,
    finished,
    in_child,
    judge,
    small_config,
    workshop,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from filesystems import KINDS, mounted, why_not  # noqa: E402
from killing import operations  # noqa: E402

from launch.plan import plan  # noqa: E402
from launch.prepare import check, lay_out  # noqa: E402
from pipeline.config import Config  # noqa: E402

OTHER = ("train.learning_rate=0.002", "specialists.learning_rate=0.001")
STATES = ("done", "half trained")


def main(given: Asked) -> int:
    count = Count("kills while clearing", given)
    with workshop() as (place, data):
        old, new = small_config(data), small_config(data, *OTHER)
        finished(place / "done", old)
        leave_half_trained(place / "done", place / "half trained")
        expected = finished(place / "clean", new)
        totals = {state: operations_of(place, state, new) for state in STATES}
        for kind in KINDS:
            if reason := why_not(kind):
                print(f"{count.name}: {kind} is skipped: {reason}")
                continue
            with mounted(kind) as disk:
                root = disk.path / "run"
                for trial in given.trials:
                    state = STATES[trial % 2]
                    rng = random.Random(f"{given.seed} {kind} {trial}")
                    last = rng.randrange(totals[state])
                    shutil.copytree(place / state, root, symlinks=True)
                    ended = in_child(partial(clear, root, new, last, really=True))
                    assert ended.code == -signal.SIGKILL, ended
                    outcome = in_child(partial(command, root, new))
                    again = partial(in_child, partial(command, root, new, force=True))
                    said = f"{trial}: {kind}, {state}, after {last} of {totals[state]} operations"
                    judge(count, said, outcome, root, expected, again)
                    shutil.rmtree(root)
    return count.report()


def clear(root: Path, config: Config, last: int | None, really: bool) -> int:
    """The beginning of `run --force`, ended at file operation `last`. How many there were."""
    run, stale = check(config, root, force=True)
    jobs = plan(run)
    with operations(last, really) as counted:
        lay_out(run, jobs, stale)
    return counted.count


def operations_of(place: Path, state: str, config: Config) -> int:
    """How many file operations clearing takes."""
    root = place / "counted"
    shutil.copytree(place / state, root, symlinks=True)
    total = clear(root, config, None, really=False)
    shutil.rmtree(root)
    return total


def leave_half_trained(done: Path, half: Path) -> None:
    """A run as kills leave it: checkpoints and attempts, and nothing done."""
    shutil.copytree(done, half, symlinks=True)
    for marker in half.glob("**/DONE"):
        if marker.parent.parent.name != "attempts":
            marker.unlink()


if __name__ == "__main__":
    sys.exit(main(asked(36)))
