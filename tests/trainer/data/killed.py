"""A training stream of several ranks and workers, killed at random moments and resumed.

    python tests/trainer/data/killed.py 20 [--seed SEED]
        checks a run that is killed 20 times: `make soak`
    python tests/trainer/data/killed.py DIRECTORY RANKS WORKERS STEPS
        resumes a run until it ends

The run keeps DIRECTORY/seen, a line for every global batch in the order in which it came: its step,
and a hash of the keys, labels, sources and decoded, augmented inputs.  Its whole state is one
number, written now and then as a training run writes checkpoints, so that the steps after it are
seen again.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import numpy as np  # noqa: E402
from campaigns import Asked, asked  # noqa: E402
from shardsets import png, write_tar  # noqa: E402

from pipeline.config import Data  # noqa: E402
from pipeline.store import read_json, write_json  # noqa: E402
from trainer.data import Source, TrainingStream, balanced, open_shards, shuffled  # noqa: E402

SIZES = [1, 40, 7, 13, 60, 2, 27]
# A corrupt sample in training has a stand-in, which must be the same one again.
UNREADABLE = {5, 90}
EVERY = 7  # steps between two states


def write_shards(directory: Path) -> None:
    number = 0
    for shard, size in enumerate(SIZES):
        files = []
        for _ in range(size):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
            content = b"no picture" if number in UNREADABLE else png(pixels)
            files += [(f"{number:05d}.cls", b"%d" % (number % 5)), (f"{number:05d}.png", content)]
            number += 1
        write_tar(directory / f"train-{shard:06d}.tar", files)


def the_stream(directory: Path) -> TrainingStream:
    """15 examples of class 1, 33 of all classes balanced: of raw shards, mirrored and shifted."""
    data = Data(classes=5, damage="skip", damage_share=0.1, cache="none")
    shards = open_shards(str(directory / "train-*.tar"), data, "train")
    own = Source(shards, shuffled(np.flatnonzero(shards.labels == 1), 3), 15)
    rest = Source(shards, balanced(shards.labels, 4, 1.0), 33)
    return TrainingStream([own, rest], 5, "flip-crop")


def digests(stream: TrainingStream, batch) -> list[bytes]:
    """One for each example: of its key, label, source and input."""
    keys = stream.sources[0].shards.keys(batch.ids.numpy())
    labels, sources = batch.labels.tolist(), batch.source.tolist()
    hashes = []
    for key, label, source, inputs in zip(keys, labels, sources, batch.inputs.numpy(), strict=True):
        content = f"{key} {label} {source} ".encode() + inputs.tobytes()
        hashes.append(hashlib.sha256(content).digest())
    return hashes


def line(step: int, examples: list[bytes]) -> str:
    return f"{step} {hashlib.sha256(b''.join(examples)).hexdigest()}"


def uninterrupted(directory: Path, steps: int) -> list[str]:
    """What one process without workers sees, batch by batch."""
    stream = the_stream(directory)
    return [line(step, digests(stream, stream.batch(step))) for step in range(steps)]


def read_as_rank(
    directory: Path, first: int, steps: int, rank: int, ranks: int, workers: int, pipe
) -> None:
    stream = the_stream(directory)
    for batch in stream.loader(first, steps, rank, ranks, workers):
        pipe.send(digests(stream, batch))


def resume(directory: Path, ranks: int, workers: int, steps: int) -> None:
    """Read from the last state to the end, each rank in a process of its own."""
    first = 0
    if (directory / "state.json").exists():
        first = read_json(directory / "state.json")["step"]
    fork = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = fork.Pipe(duplex=False)
        arguments = (directory, first, steps, rank, ranks, workers, theirs)
        processes.append(fork.Process(target=read_as_rank, args=arguments))
        processes[-1].start()
        theirs.close()  # so that a rank that ends too early is an EOFError here
        pipes.append(ours)
    seen = os.open(directory / "seen", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for step in range(first, steps):
        parts = [pipe.recv() for pipe in pipes]
        whole: list[bytes] = [b""] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank::ranks] = part
        os.write(seen, f"{line(step, whole)}\n".encode())
        if (step + 1) % EVERY == 0:
            write_json(directory / "state.json", {"step": step + 1})
    for process in processes:
        process.join()


def start(directory: Path, ranks: int, workers: int, steps: int) -> subprocess.Popen:
    python = [sys.executable, "-W", "ignore::UserWarning"]
    words = [*python, __file__, directory, ranks, workers, steps]
    return subprocess.Popen([str(word) for word in words], start_new_session=True)


def kill_at_random(directory: Path, chance: random.Random, steps: int, kills: int) -> dict:
    """Start the run anew at random ranks and workers, and kill all its processes."""
    geometry = {"ranks": chance.choice([1, 2, 3]), "workers": chance.choice([0, 1, 2])}
    process, before = start(directory, **geometry, steps=steps), lines_seen(directory)
    enough = before + chance.randrange(steps // (2 * kills))
    while lines_seen(directory) < enough and process.poll() is None:
        time.sleep(0.002)
    time.sleep(chance.choice([0, 0, 0.01, 0.02, 1]) * chance.random())
    assert process.poll() is None, f"the run ended before it could be killed: {geometry}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return geometry | {"seen": lines_seen(directory) - before}


def lines_seen(directory: Path) -> int:
    path = directory / "seen"
    if not path.exists():
        return 0
    return path.read_bytes().count(b"\n")


def judge(directory: Path, kills: int, steps: int, seed: int) -> list[dict]:
    """Kill a run of `steps` steps `kills` times, let it end, and compare.

    Returns what the attempts were.
    """
    write_shards(directory)
    expected, chance = uninterrupted(directory, steps), random.Random(seed)
    hashes = {each.split()[1] for each in expected}
    assert len(hashes) == steps, "batches repeat: hashes would tell nothing"
    attempts = [kill_at_random(directory, chance, steps, kills) for _ in range(kills)]
    last = {"ranks": chance.choice([1, 2, 3]), "workers": chance.choice([0, 1, 2])}
    assert start(directory, **last, steps=steps).wait(600) == 0
    seen = (directory / "seen").read_text().splitlines()
    wrong = [each for each in seen if each != expected[int(each.split()[0])]]
    assert not wrong, f"{len(wrong)} of {len(seen)} batches differ: {wrong[0]}, {attempts}"
    never = set(expected) - set(seen)
    assert set(seen) == set(expected), f"{len(never)} steps were never seen: {attempts}"
    return [*attempts, last | {"seen": len(seen) - sum(attempt["seen"] for attempt in attempts)}]


def soak(given: Asked) -> None:
    kills = len(given.trials)
    with tempfile.TemporaryDirectory() as directory:
        attempts = judge(Path(directory), kills, steps=100 * kills, seed=given.seed)
    for attempt in attempts:
        print(json.dumps(attempt))
    again = sum(attempt["seen"] for attempt in attempts) - 100 * kills
    print(f"{kills} kills: all {100 * kills} steps as uninterrupted, {again} of them seen again")


if __name__ == "__main__":
    if len(sys.argv) == 5 and Path(sys.argv[1]).is_dir():
        resume(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    else:
        soak(asked(20))
