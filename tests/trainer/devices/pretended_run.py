"""A whole toy run on the pretended device, in this process group. Rank 0's last line is JSON.

    pretended_run.py DATA ROOT [KEY=VALUE ...] [stages=generalist]

Waits of a training are those of each turn of the loop after the third: torch asks the host once,
when it arranges the buckets of gradients anew.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
from pretended import pretended  # noqa: E402
from toy import toy_config  # noqa: E402

from pipeline.config import save_config  # noqa: E402
from pipeline.graph import RunDirectory  # noqa: E402
from trainer.core import loop  # noqa: E402
from trainer.distributed.exit import leave  # noqa: E402
from trainer.distributed.ranks import process_group  # noqa: E402
from trainer.session import Session  # noqa: E402
from trainer.stages import run_stage  # noqa: E402

QUIET = (
    "train.steps=12",
    "train.log_every=1000",
    "train.checkpoint_every=1000",
    "specialists.steps=8",
    "students.main.steps=8",
)


def note_turns(device, trained: dict[str, list[dict[str, int]]]) -> None:
    """Note what each turn of the loop waits for, {"KIND LINE OPERATOR": times}, by training."""
    plain = loop.Trainer.train_step
    before: dict[str, Counter] = {}

    def train_step(trainer, batch, rate):
        plain(trainer, batch, rate)
        name = trainer.files.name
        now = Counter(device.waits)
        if name in before and 3 < trainer.progress.step < trainer.task.steps:
            turn = now - before[name]
            waits = {f"{kind} {where}": times for (kind, where), times in turn.items()}
            trained.setdefault(name, []).append(waits)
        before[name] = now

    loop.Trainer.train_step = train_step


def main(data: str, root: str, *words: str) -> None:
    overrides = [word for word in words if not word.startswith("stages=")]
    only = [word.removeprefix("stages=") for word in words if word not in overrides]
    config = toy_config(Path(data), *QUIET, *overrides)
    path = Path(root)
    with pretended() as device, process_group(config.engine) as ranks:
        if ranks.is_main:
            path.mkdir(parents=True, exist_ok=True)
            save_config(config, path / "config.toml")
        session = Session(RunDirectory(path, config), ranks)
        session.barrier()
        trained: dict[str, list[dict[str, int]]] = {}
        stages: dict[str, dict[str, int]] = {}
        note_turns(device, trained)
        for stage in session.run.stages:
            if only and stage.name not in only:
                continue
            before = Counter(device.waits)
            run_stage(session, stage)
            waited = Counter(device.waits) - before
            stages[str(stage.place)] = {f"{k} {where}": n for (k, where), n in waited.items()}
        if ranks.is_main:
            print(json.dumps({"trained": trained, "stages": stages}), flush=True)


if __name__ == "__main__":
    leave(lambda: main(*sys.argv[1:]))
