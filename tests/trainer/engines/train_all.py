"""Train the toy's generalist by every engine in turn, in this one process group.

    train_all.py DATA OUT [ENGINE ...] [KEY=VALUE ...] [stop=STEP]

ENGINE is ddp, zero0 ... zero3.  KEY=VALUE overrides the config, and stop=STEP sends every run the
stop signal at that step.  A run that is there is resumed.  narrow=C,D: no tensor of this shape may
ever be made.
"""

import itertools
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
from ranks import engine_overrides  # noqa: E402
from toy import toy_config  # noqa: E402

from networks import head_rows  # noqa: E402
from pipeline.config import save_config  # noqa: E402
from pipeline.graph import RunDirectory
from trainer.core import loop  # noqa: E402
from trainer.distributed.exit import leave  # noqa: E402
from trainer.distributed.ranks import process_group  # noqa: E402
from trainer.session import Session  # noqa: E402
from trainer.stages import run_stage  # noqa: E402

SGD = [
    "train.optimizer=sgd",
    "train.momentum=0.9",
    "train.learning_rate=0.1",
    "train.steps=50",
    "train.log_every=1",
]


class Narrow(TorchDispatchMode):
    """Fails where an operator gives a tensor of one shape, "C,D"."""

    def __init__(self, shape: str):
        super().__init__()
        head_rows.DRAWN = 100  # which a few of the toy's classes fill
        self.shape = tuple(map(int, shape.split(",")))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            assert not isinstance(each, torch.Tensor) or each.shape != self.shape, func
        return result


def main(data: str, out: str, *words: str) -> None:
    engines = [word for word in words if "=" not in word]
    own = ("stop=", "narrow=")
    overrides = [word for word in words if "=" in word and not word.startswith(own)]
    narrow = next((word[7:] for word in words if word.startswith("narrow=")), None)
    stop = next((int(word[5:]) for word in words if word.startswith("stop=")), None)
    configs = {
        engine: toy_config(Path(data), *SGD, *engine_overrides(engine), *overrides)
        for engine in engines
    }
    with process_group(configs[engines[0]].engine) as ranks:
        for engine, config in configs.items():
            root = Path(out) / engine
            if ranks.is_main:
                root.mkdir(parents=True, exist_ok=True)
                save_config(config, root / "config.toml")
            session = Session(RunDirectory(root, config), ranks)
            session.barrier()
            steps = itertools.count(1)
            loop.StopSignal.agreed = lambda self, ranks, steps=steps: next(steps) == stop
            try:
                with Narrow(narrow) if narrow else nullcontext():
                    run_stage(session, session.run.generalist)
            except loop.Interrupted:
                assert stop is not None


if __name__ == "__main__":
    leave(lambda: main(*sys.argv[1:]))
