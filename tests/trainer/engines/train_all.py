"""Train the toy's generalist by every engine in turn, in this one process group.

    train_all.py DATA OUT [ENGINE ...] [KEY=VALUE ...] [stop=STEP]

ENGINE is ddp, zero0 ... zero3.  KEY=VALUE overrides the config, and stop=STEP sends every run the
stop signal at that step.  A run that is there is resumed.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
from ranks import engine_overrides  # noqa: E402
from toy import toy_config  # noqa: E402

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


def main(data: str, out: str, *words: str) -> None:
    engines = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word and not word.startswith("stop=")]
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
                run_stage(session, session.run.generalist)
            except loop.Interrupted:
                assert stop is not None


if __name__ == "__main__":
    leave(lambda: main(*sys.argv[1:]))
