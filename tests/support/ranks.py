"""Scripts and stages on several gloo ranks of this machine, and what a run of theirs left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from torch import Tensor

from networks import load_classifier
from pipeline.graph import RunDirectory

ENGINES = Path(__file__).parents[1] / "trainer" / "engines"


def gloo_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start_stage(ranks: int, stage: str, root: Path, *options: str) -> subprocess.Popen[str]:
    """A stage of the run at `root` under torchrun, in a session (process group) of its own.

    stage: words of the trainer's, "generalist" or "member --index 1".  options: behind --run.
    """
    command = [sys.executable, "-P", "-m", "trainer.distributed.torchrun", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--", *stage.split(), "--run", str(root)]
    command += options
    return subprocess.Popen(
        command,
        env=gloo_environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stage_on_ranks(ranks: int, stage: str, root: Path, timeout: float = 120) -> str:
    """The output of a stage. An AssertionError with it where the stage fails."""
    process = start_stage(ranks, stage, root)
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def on_ranks(ranks: int, script: Path, *arguments, timeout: float = 280) -> str:
    """The output of a script. An AssertionError with its end where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(script), *map(str, arguments)]
    ended = subprocess.run(
        command,
        env=gloo_environment(),
        text=True,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert ended.returncode == 0, ended.stdout[-5000:]
    return ended.stdout


def kill_after_a_checkpoint(ranks: int, run: RunDirectory) -> None:
    """Start the generalist of a run and kill -9 all of it, once it has a whole checkpoint."""
    process = start_stage(ranks, "generalist", run.root)
    deadline = time.monotonic() + 100
    checkpoints = run.generalist.directory / "checkpoints"
    while not list(checkpoints.glob("step-*/COMPLETE")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not run.generalist.is_done, "the run was over before it could be killed"


def engine_overrides(engine: str) -> list[str]:
    """What selects ddp, or zero0 to zero3, in a config."""
    if engine == "ddp":
        return []
    return ["engine.name=deepspeed", f"engine.zero_stage={engine.removeprefix('zero')}"]


def losses(run: Path) -> list[float]:
    """The losses that the generalist logged."""
    rows = map(json.loads, (run / "generalist" / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def weights(run: Path) -> dict[str, Tensor]:
    return load_classifier(run / "generalist").state_dict()
