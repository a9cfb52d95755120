"""What a worker of a training stream holds in memory over many epochs of raw shards.

`python tests/trainer/data/memory.py [EPOCHS]` prints a line of JSON: bytes per epoch and bound.
"""

import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import numpy as np  # noqa: E402
from shardsets import png, write_tar  # noqa: E402

from pipeline.config import Data  # noqa: E402
from trainer.data import Source, TrainingStream, open_shards, shuffled  # noqa: E402

SAMPLES, BATCH, SIDE = 960, 64, 64


def private_bytes(pid: int) -> int:
    """What the process alone has in memory: its private pages, not those shared with its parent."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = [line for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))]
    return 1024 * sum(int(line.split()[1]) for line in private)


def measure(directory: Path, epochs: int) -> dict:
    """{"worker": [the most that the worker held in each epoch], "batch": bytes of a batch}."""
    rng = np.random.default_rng(0)
    for shard in range(4):
        files = []
        for number in range(shard * SAMPLES // 4, (shard + 1) * SAMPLES // 4):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            files += [(f"{number:05d}.cls", b"0"), (f"{number:05d}.png", png(pixels))]
        write_tar(directory / f"train-{shard}.tar", files)
    shards = open_shards(str(directory), Data(classes=1, cache="none"), "train")
    stream = TrainingStream([Source(shards, shuffled(SAMPLES, 0), BATCH)], 0, "flip-crop")
    most = np.zeros(epochs, np.int64)
    steps = SAMPLES // BATCH
    for step, _ in enumerate(stream.loader(0, epochs * steps, workers=1)):
        (worker,) = multiprocessing.active_children()
        most[step // steps] = max(most[step // steps], private_bytes(worker.pid))
    return {"worker": most.tolist(), "batch": BATCH * 3 * SIDE * SIDE}


if __name__ == "__main__":
    num_epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(Path(temporary), num_epochs)))
