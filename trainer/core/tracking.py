"""Send the rows of metrics.jsonl to TensorBoard or Weights & Biases: extras, imported on demand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from pipeline.extras import require

Row = dict[str, float]
Tracker = Callable[[Row], None]


@contextmanager
def trackers(
    names: Sequence[str], directory: Path, run: Path, stage: str
) -> Iterator[list[Tracker]]:
    """A function of a row for each of `names`.

    directory: the attempt's own, so that its event files are whole.
    """
    with ExitStack() as stack:
        yield [
            stack.enter_context(KINDS[name](directory, run, stage)) for name in dict.fromkeys(names)
        ]


@contextmanager
def tensorboard(directory: Path, run: Path, stage: str) -> Iterator[Tracker]:
    """Event files under `directory`. `tensorboard --logdir RUN` shows every stage."""
    require("tensorboard", 'engine.track = ["tensorboard"]')
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory / "tensorboard")) as writer:

        def track(row: Row) -> None:
            for key, value in row.items():
                if key not in ("step", "steps", "time"):
                    writer.add_scalar(key, value, int(row["step"]), walltime=row.get("time"))

        yield track


@contextmanager
def wandb(directory: Path, run: Path, stage: str) -> Iterator[Tracker]:
    """One W&B run per stage, grouped by RUN. A resumed stage continues its own.

    W&B's environment variables (WANDB_PROJECT and the like) apply.
    """
    require("wandb", 'engine.track = ["wandb"]')
    import wandb  # pyright: ignore[reportMissingImports]  # an extra

    identity = hashlib.sha256(f"{run.resolve()}/{stage}".encode()).hexdigest()[:16]
    session = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "referral"),
        group=run.name,
        name=stage,
        id=identity,
        resume="allow",
        dir=str(directory),
    )

    def track(row: Row) -> None:
        values = {key: value for key, value in row.items() if key != "step"}
        session.log(values, step=row["step"])

    try:
        yield track
    finally:
        session.finish()


KINDS: dict[str, Callable[[Path, Path, str], AbstractContextManager[Tracker]]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
}
