"""A training stream over shards that stream, resumed from its last state.

python tests/trainer/data/arriving.py URL DIRECTORY CACHE RANKS WORKERS
    reads two epochs by RANKS processes of WORKERS each. DIRECTORY/seen gets a line for every step,
    DIRECTORY/state.json the step now and then
"""

import hashlib
import multiprocessing
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

from pipeline.config import Data  # noqa: E402
from pipeline.store import read_json, write_json  # noqa: E402
from trainer.data import Source, TrainingStream, open_shards, shuffled  # noqa: E402

SIZES = [24] * 24
BATCH = 16
STEPS = 2 * sum(SIZES) // BATCH
EVERY = 5  # steps between two states
# Less than half of the set: three windows of two shards, and the first of all.
FETCH_BYTES = 540_000
AMPLE = 1 << 30


def data_of(url: str, cache: Path, fetch_bytes: int = FETCH_BYTES, workers: int = 0) -> Data:
    """A window of two shards."""
    return Data(
        train=url,
        fetch_dir=str(cache),
        fetch_bytes=fetch_bytes,
        stream_shards=2,
        cache="none",
        workers=workers,
    )


def the_stream(data: Data) -> TrainingStream:
    shards = open_shards(data.train, data, "train")
    return TrainingStream([Source(shards, shuffled(len(shards), 3), BATCH)], 5, "shift")


def digests(batch) -> list[bytes]:
    """One for each example: of its number, label and augmented input."""
    hashes = []
    for number, label, pixels in zip(batch.ids, batch.labels, batch.inputs, strict=True):
        content = f"{number} {label} ".encode() + pixels.numpy().tobytes()
        hashes.append(hashlib.sha256(content).digest())
    return hashes


def line(step: int, examples: list[bytes]) -> str:
    return f"{step} {hashlib.sha256(b''.join(examples)).hexdigest()}"


def read_as_rank(data: Data, first: int, rank: int, ranks: int, pipe) -> None:
    stream = the_stream(data)
    for batch in stream.loader(first, STEPS, rank, ranks, data.workers or 0):
        pipe.send(digests(batch))
        pipe.recv()  # as gradients do, it makes ranks wait for each other


def run(url: str, directory: Path, cache: Path, ranks: int, workers: int) -> None:
    """From the last state to the end of the second epoch. Ranks wait for each other."""
    state, first = directory / "state.json", 0
    if state.exists():
        first = read_json(state)["step"]
    data = data_of(url, cache, workers=workers)
    fork = multiprocessing.get_context("fork")
    pipes = []
    for rank in range(ranks):
        ours, theirs = fork.Pipe()
        fork.Process(target=read_as_rank, args=(data, first, rank, ranks, theirs)).start()
        theirs.close()
        pipes.append(ours)
    seen = os.open(directory / "seen", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for step in range(first, STEPS):
        whole: list[bytes] = [b""] * BATCH
        for rank, pipe in enumerate(pipes):
            whole[rank::ranks] = pipe.recv()
        for pipe in pipes:
            pipe.send(True)
        os.write(seen, f"{line(step, whole)}\n".encode())
        if (step + 1) % EVERY == 0:
            write_json(state, {"step": step + 1})


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
