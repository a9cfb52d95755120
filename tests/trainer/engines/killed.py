"""Kill a training run at random moments until it ends. Its weights are the undisturbed run's.

    python tests/trainer/engines/killed.py [KILLS_PER_ENGINE] [ENGINE ...] [--seed SEED]

Each kill is a `kill -9` of one worker, of all workers, or of the launcher.  The same command then
resumes the run.
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
from campaigns import asked  # noqa: E402
from ranks import engine_overrides, weights  # noqa: E402
from toy import toy_config, write_toy  # noqa: E402

from pipeline.config import save_config  # noqa: E402
from pipeline.graph import RunDirectory
from pipeline.store import complete_checkpoints
from trainer.core.checkpoints import load_checkpoint  # noqa: E402

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
KINDS = ("worker", "workers", "launcher")
STEPS = [
    "train.steps=1200",
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


def start(run: RunDirectory, ranks: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-P", "-m", "trainer.distributed.torchrun", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--", "generalist", "--run", str(run.root)]
    log = open(run.root / "log.txt", "ab")
    return subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def workers(launcher: int) -> list[int]:
    command = ["pgrep", "-P", str(launcher)]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    return [int(pid) for pid in output.split()]


def kill(launcher: subprocess.Popen, kind: str, rng: random.Random) -> None:
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


def disturbed(run: RunDirectory, kills: list[str], longest_s: float, rng: random.Random) -> int:
    """Run to the end, killed as `kills` says.  Returns how many kills hit a running job."""
    hits = 0
    for kind in [*kills, None]:
        process = start(run)
        if kind is not None:
            try:
                process.wait(rng.uniform(0, longest_s))
            except subprocess.TimeoutExpired:
                hits += 1
                kill(process, kind, rng)
        code = process.wait(300)
        # A checkpoint marked COMPLETE can be read.
        for path in complete_checkpoints(run.generalist.directory / "checkpoints"):
            load_checkpoint(path.parent, int(path.name.removeprefix("step-")))
        if run.generalist.is_done:
            return hits
        end = f"the undisturbed last attempt ended with {code}: see {run.root}/log.txt"
        assert kind is not None, end
        time.sleep(0.3)  # for orphans to die with their launcher
    raise AssertionError("unreachable")


def difference(one: RunDirectory, other: RunDirectory) -> float:
    """The largest difference between the weights of two runs' generalists."""
    ours, theirs = weights(one.root), weights(other.root)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def soak(engine: str, kills: int, directory: Path, seed: int = 0) -> str:
    rng, data = random.Random(seed), directory / "data"
    if not data.exists():
        write_toy(data)
    whole = prepare(directory / f"{engine}-whole", data, engine)
    began = time.monotonic()
    assert start(whole).wait(600) == 0, (whole.root / "log.txt").read_text()[-3000:]
    longest = time.monotonic() - began
    done = runs = 0
    worst = 0.0
    while done < kills:
        run = prepare(directory / f"{engine}-{runs}", data, engine)
        kinds = [KINDS[(done + k) % len(KINDS)] for k in range(min(3, kills - done))]
        done += disturbed(run, kinds, longest, rng)
        worst = max(worst, difference(whole, run))
        runs += 1
    assert worst <= TOLERANCE.get(engine, 1e-6), f"{engine}: weights differ by {worst}"
    return f"{engine}: {done} kills in {runs} runs, weights differ by at most {worst:g}"


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        given = asked(30, "ENGINE")
        for name in given.words or ENGINES:
            print(soak(name, len(given.trials), Path(directory), given.seed), flush=True)
