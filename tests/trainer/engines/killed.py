"""Kill a training run at random moments until it ends. Its weights are the undisturbed run's.

    python tests/trainer/engines/killed.py [KILLS_PER_ENGINE] [ENGINE ...] [--seed SEED]

Each kill is a `kill -9` of one worker, of all workers, or of the launcher.  The same command then
resumes the run.  Of EVERY attempts one is that command itself. The others are forks of this
process, which has torch and the engines loaded: the start of interpreters would take most of the
time, and most kills would fall into it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
import forked_ranks  # noqa: E402
from campaigns import asked  # noqa: E402
from ranks import engine_overrides, weights  # noqa: E402
from toy import toy_config, write_toy  # noqa: E402

from pipeline.config import save_config  # noqa: E402
from pipeline.graph import RunDirectory
from pipeline.store import complete_checkpoints
from trainer.core.checkpoints import load_checkpoint, newest_step  # noqa: E402

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
LAST = 570  # no kill waits for a later step
OF_THE_START = 0.25  # share of the kills
EVERY = 6
KINDS = ("worker", "workers", "launcher")
STEPS = [
    "train.steps=600",
    "train.checkpoint_every=25",
    "train.log_every=25",
    "train.ema=0",
    "model.dropout=0.1",
]
# Of the weights' differences. DeepSpeed's is 1e-6.
TOLERANCE = {"ddp": 0.0}


def prepare(root: Path, data: Path, engine: str) -> RunDirectory:
    config = toy_config(data, *STEPS, *engine_overrides(engine))
    root.mkdir(parents=True)
    save_config(config, root / "config.toml")
    return RunDirectory(root, config)


def start(run: RunDirectory, forked: bool = False, ranks: int = 2):
    words = ["--standalone", "--nproc-per-node", str(ranks), "--"]
    words += ["generalist", "--run", str(run.root)]
    with open(run.root / "log.txt", "ab") as log:
        if forked:
            return forked_ranks.start(words, log)
        command = [sys.executable, "-P", "-m", "trainer.distributed.torchrun", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def workers(launcher: int) -> list[int]:
    command = ["pgrep", "-P", str(launcher)]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    return [int(pid) for pid in output.split()]


def kill(launcher, kind: str, rng: random.Random) -> None:
    victims = [launcher.pid]
    if kind != "launcher":
        victims = workers(launcher.pid)
    if kind == "worker" and victims:
        victims = rng.sample(victims, 1)
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass


def disturbed(
    run: RunDirectory,
    kills: list[str],
    first: int,
    longest_s: dict[bool, float],
    rng: random.Random,
) -> int:
    """Run to the end, killed as `kills` says.  Returns how many kills hit a running job.

    first: number of the first attempt.  longest_s: of a whole run, forked or not.
    """
    hits = 0
    for number, kind in enumerate([*kills, None], start=first):
        forked = number % EVERY > 0
        process = start(run, forked)
        if kind is not None and comes(process, run, longest_s[forked], rng):
            hits += 1
            kill(process, kind, rng)
        code = process.wait(300)
        # A checkpoint marked COMPLETE can be read.
        for path in complete_checkpoints(run.generalist.checkpoints):
            load_checkpoint(path.parent, int(path.name.removeprefix("step-")))
        if run.generalist.is_done:
            return hits
        end = f"the undisturbed last attempt ended with {code}: see {run.root}/log.txt"
        assert kind is not None, end
        time.sleep(0.3)  # for orphans to die with their launcher
    raise AssertionError("unreachable")


def comes(process, run: RunDirectory, longest_s: float, rng: random.Random) -> bool:
    """Wait for a random moment: of the start, or behind a checkpoint.  False: it has ended."""
    began, start_s = time.monotonic(), longest_s
    if rng.random() < OF_THE_START:
        start_s = rng.uniform(0, longest_s / 2)
    target = rng.randrange(min(reached(run), LAST - 1), LAST)
    while reached(run) < target and time.monotonic() < began + start_s and process.poll() is None:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.1))
    return process.poll() is None


def reached(run: RunDirectory) -> int:
    """The step of the newest checkpoint."""
    return newest_step(run.generalist.checkpoints) or 0


def difference(one: RunDirectory, other: RunDirectory) -> float:
    """The largest difference between the weights of two runs' generalists."""
    ours, theirs = weights(one.root), weights(other.root)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def seconds_of(run: RunDirectory, forked: bool) -> float:
    began = time.monotonic()
    assert start(run, forked).wait(600) == 0, (run.root / "log.txt").read_text()[-3000:]
    return time.monotonic() - began


def soak(engine: str, kills: int, directory: Path, seed: int = 0) -> str:
    rng, data = random.Random(seed), directory / "data"
    if not data.exists():
        write_toy(data)
    if engine != "ddp":
        import deepspeed  # noqa: F401  # once, and not in every rank
    whole = prepare(directory / f"{engine}-whole", data, engine)
    forked = prepare(directory / f"{engine}-forked", data, engine)
    longest = {run is forked: seconds_of(run, run is forked) for run in (whole, forked)}
    worst = difference(whole, forked)
    done = runs = attempts = 0
    while done < kills:
        run = prepare(directory / f"{engine}-{runs}", data, engine)
        kinds = [KINDS[(done + k) % len(KINDS)] for k in range(min(3, kills - done))]
        done += disturbed(run, kinds, attempts, longest, rng)
        worst = max(worst, difference(whole, run))
        attempts += len(kinds) + 1
        runs += 1
    assert worst <= TOLERANCE.get(engine, 1e-6), f"{engine}: weights differ by {worst}"
    return f"{engine}: {done} kills in {runs} runs, weights differ by at most {worst:g}"


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        given = asked(30, "ENGINE")
        for name in given.words or ENGINES:
            began = time.monotonic()
            said = soak(name, len(given.trials), Path(directory), given.seed)
            print(f"{said}, {time.monotonic() - began:.0f} s", flush=True)
