"""Take the power from the file system under a run, and let the plain command go on.

    python tests/trust/power.py [LOSSES] [--first NUMBER] [--seed SEED]

ext4 and XFS in images are shut down without flushing (XFS_IOC_GOINGDOWN), at random moments of the
run and just after its stages ended.  What was not synced is gone then, as at a power loss.  Where
nothing can be mounted, all are skipped with one line.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from small import (  # noqa: E402
    Asked,
    Count,
    asked,
    command,
    finished,
    fork,
    in_child,
    judge,
    small_config,
    wait,
    workshop,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from filesystems import Mounted, mounted, why_not  # noqa: E402

from pipeline.config import Config  # noqa: E402

KINDS = ("ext4", "xfs")
PAUSES_S = (0.0, 0.05, 0.3)  # after a stage's DONE appeared


def main(given: Asked) -> int:
    count = Count("power losses", given)
    with workshop() as (place, data):
        config = small_config(data)
        expected = finished(place / "clean", config)
        stages = len(markers(place / "clean"))
        reasons = {kind: why_not(kind) for kind in KINDS}
        for kind, reason in reasons.items():
            if reason:
                print(f"{count.name}: {kind} is skipped: {reason}")
        for trial in given.trials:
            kind, rng = KINDS[trial % len(KINDS)], random.Random(f"{given.seed} {trial}")
            if reasons[kind]:
                continue
            done, pause = rng.randrange(stages + 1), rng.choice(PAUSES_S)
            with mounted(kind) as disk:
                root = disk.path / "run"
                lose_power_under(disk, root, config, done, pause)
                outcome = in_child(partial(command, root, config))
                again = partial(in_child, partial(command, root, config))
                said = f"{trial}: {kind}, {pause} s after {done} of {stages} stages"
                judge(count, said, outcome, root, expected, again)
    return count.report()


def lose_power_under(disk: Mounted, root: Path, config: Config, done: int, pause: float) -> None:
    """Start the run, and end it with its file system once so many stages are done."""
    with tempfile.TemporaryFile() as output:
        child = fork(partial(command, root, config), output.fileno())
        while len(markers(root)) < done and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(0.002)
        time.sleep(pause)
        disk.lose_power()
        try:
            os.kill(child, signal.SIGKILL)
            wait(child)
        except (ProcessLookupError, ChildProcessError):  # it had ended
            pass
    disk.unmount()
    disk.mount()


def markers(root: Path) -> list[Path]:
    """DONE of every stage."""
    try:
        return [path for path in root.glob("**/DONE") if path.parent.parent.name != "attempts"]
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main(asked(24)))
