"""Two commands do one run at once, as where locks do not reach from one host to the other.

    python tests/trust/twins.py [PAIRS] [--first NUMBER] [--seed SEED]

The second calls its machine by another name, and begins up to a second later.  In some pairs one of
the two is killed, or stopped for a while (SIGSTOP) and then goes on.  A stage's first DONE counts.
The run has the figures of an undisturbed one, and what a twin cannot do is one line.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from small import (  # noqa: E402
    Asked,
    Count,
    Outcome,
    asked,
    command,
    figures,
    finished,
    fork,
    hidden,
    in_child,
    small_config,
    wait,
    workshop,
)

from pipeline.config import Config  # noqa: E402

ENDS = ("both end", "one is killed", "one is stopped")
LATEST_S = 1.0
STOPPED_S = 3.0
OTHER_HOST = "another-host"


def main(given: Asked) -> int:
    count = Count("twins", given)
    with workshop() as (place, data):
        config = small_config(data)
        expected = finished(place / "clean", config)
        for trial in given.trials:
            rng, root = random.Random(f"{given.seed} {trial}"), place / "run"
            end = ENDS[trial % len(ENDS)]
            outcomes = together(root, config, end, rng)
            said = "\n".join(each.text for each in outcomes)
            verdict = verdict_of(outcomes, end)
            if not verdict:
                last = in_child(partial(command, root, config))
                said += last.text
                verdict = "went on"
                if last.code:
                    verdict = "traceback" if last.is_traceback else "stuck"
                elif figures(root) != expected:
                    verdict = "silent difference"
                elif left := [each for each in hidden(root) if OTHER_HOST not in each.name]:
                    verdict, said = "left behind", said + "\n".join(map(str, left))
            count.add(verdict, f"{trial}: {end}", said)
            shutil.rmtree(root)
    return count.report()


def together(root: Path, config: Config, end: str, rng: random.Random) -> list[Outcome]:
    """What became of the two."""
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        twins = [fork(partial(command, root, config), one.fileno())]
        time.sleep(rng.uniform(0, LATEST_S))
        twins.append(fork(partial(elsewhere, root, config), other.fileno()))
        if end != "both end":
            time.sleep(rng.uniform(0, 2 * LATEST_S))
            disturb(rng.choice(twins), end)
        codes = [wait(twin) for twin in twins]
        outcomes = []
        for code, output in zip(codes, (one, other), strict=True):
            output.seek(0)
            outcomes.append(Outcome(code, output.read().decode("utf-8", "replace")))
        return outcomes


def elsewhere(root: Path, config: Config) -> int:
    socket.gethostname = lambda: OTHER_HOST
    return command(root, config)


def disturb(twin: int, end: str) -> None:
    """Its number stays its own until somebody waits for it."""
    if end == "one is killed":
        os.kill(twin, signal.SIGKILL)
        return
    os.kill(twin, signal.SIGSTOP)
    time.sleep(STOPPED_S)
    os.kill(twin, signal.SIGCONT)


def verdict_of(outcomes: list[Outcome], end: str) -> str:
    """What is wrong with how the two ended. Empty if nothing."""
    for outcome in outcomes:
        if end == "one is killed" and outcome.code == -signal.SIGKILL:
            continue
        if outcome.is_traceback:
            return "traceback"
        if outcome.code and not outcome.is_one_line:
            return "stuck"
    return ""


if __name__ == "__main__":
    sys.exit(main(asked(30)))
