"""The rows of metrics.jsonl, sent to TensorBoard or Weights & Biases as well: extras, imported only if asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.config import UserError


@contextmanager
def trackers(
    names: Sequence[str], directory: Path, run: Path, stage: str
) -> Iterator[list[Callable[[dict], None]]]:
    """A function of a row for each of `names`.  directory: the attempt's, whose event files are then whole."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(KINDS[name](directory, run, stage)) for name in dict.fromkeys(names)
        ]


@contextmanager
def tensorboard(directory: Path, run: Path, stage: str) -> Iterator[Callable[[dict], None]]:
    """`tensorboard --logdir RUN` shows every stage."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "engine.track: tensorboard is not installed; pip install 'referral[tensorboard]'"
        ) from None
    with SummaryWriter(str(directory / "tensorboard")) as writer:

        def track(row: dict) -> None:
            for key, value in row.items():
                if key not in ("step", "steps", "time"):
                    writer.add_scalar(key, value, row["step"], walltime=row.get("time"))

        yield track


@contextmanager
def wandb(directory: Path, run: Path, stage: str) -> Iterator[Callable[[dict], None]]:
    """One W&B run per stage, grouped by RUN; a resumed stage goes on in its own.  WANDB_PROJECT and the like hold."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "engine.track: wandb is not installed; pip install 'referral[wandb]'"
        ) from None
    identity = hashlib.sha256(f"{run.resolve()}/{stage}".encode()).hexdigest()[:16]
    session = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "referral"),
        group=run.name,
        name=stage,
        id=identity,
        resume="allow",
        dir=str(directory),
    )
    try:
        yield lambda row: session.log(
            {key: value for key, value in row.items() if key != "step"}, step=row["step"]
        )
    finally:
        session.finish()


KINDS = {"tensorboard": tensorboard, "wandb": wandb}
