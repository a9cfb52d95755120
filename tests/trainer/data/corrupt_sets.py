"""Corrupt shard sets, seeded, and checks of how they are read.

They are read by a measuring pass, a training stream, `trainer check` and `referral shards
validate`.  `python tests/trainer/data/corrupt_sets.py 1000` checks a thousand: `make soak`.
"""

import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import numpy as np  # noqa: E402
import tomli_w  # noqa: E402
from campaigns import Asked, asked  # noqa: E402
from shardsets import CLASSES, label_of, picture, tar_files, write_tar, write_uneven  # noqa: E402

from pipeline.config import Data, UserError  # noqa: E402
from trainer.__main__ import main as trainer_main  # noqa: E402
from trainer.data import (  # noqa: E402
    MeasuringStream,
    Source,
    TrainingStream,
    cached,
    open_shards,
    shuffled,
)
from trainer.data.label_files import write_labels  # noqa: E402

SIZES = [5, 40, 12]
READERS = ["in process", "two workers", "cached"]
CACHE = {"in process": "none", "two workers": "none", "cached": "decoded"}
WORKERS = {"in process": 0, "two workers": 2, "cached": 0}
SECONDS = 120  # a set that takes longer hangs. The slowest takes about two


def numbers_of(shard: int) -> range:
    return range(sum(SIZES[:shard]), sum(SIZES[: shard + 1]))


def truncated(path, chance):
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(1, len(content.rstrip(b"\0")))])


def cut_between_members(path, chance):
    content = path.read_bytes()
    path.write_bytes(content[: 512 * chance.randrange(1, len(content.rstrip(b"\0")) // 512)])


def garbled(path, chance):
    content = bytearray(path.read_bytes())
    start = chance.randrange(0, len(content.rstrip(b"\0")))
    length = min(chance.choice([1, 16, 512, 4096]), len(content) - start)
    content[start : start + length] = chance.randbytes(length)
    path.write_bytes(content)


def rotten(path, chance):
    """Garbled without a new time of change, as by a failing disk."""
    before = path.stat()
    garbled(path, chance)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def zeroed(path, chance):
    content = bytearray(path.read_bytes())
    start = 512 * chance.randrange(0, len(content.rstrip(b"\0")) // 512)
    length = min(chance.choice([512, 4096]), len(content) - start)
    content[start : start + length] = bytes(length)
    path.write_bytes(content)


def _rewritten(change):
    def corrupt(path, chance):
        files = tar_files(numbers_of(int(path.stem[-6:])))
        write_tar(path, change(files, chance))

    corrupt.__name__ = change.__name__
    return corrupt


@_rewritten
def missing_member(files, chance):
    del files[chance.randrange(len(files))]
    return files


@_rewritten
def duplicate_key(files, chance):
    first = 2 * chance.randrange(len(files) // 2)
    return files + files[first : first + 2]


@_rewritten
def duplicate_member(files, chance):
    index = chance.randrange(len(files))
    return files[:index] + [files[index]] + files[index:]


@_rewritten
def dotted_keys(files, chance):
    return [(f"img.{name}", content) for name, content in files]


@_rewritten
def one_dotted_key(files, chance):
    first = 2 * chance.randrange(len(files) // 2 - 1)
    key = files[first][0].partition(".")[0]
    for index in (first + 2, first + 3):
        name, content = files[index]
        files[index] = (f"{key}.v2.{name.partition('.')[2]}", content)
    return files


@_rewritten
def wrong_label(files, chance):
    index = 2 * chance.randrange(len(files) // 2)
    bad = chance.choice([b"7", b"-1", b"99999999999999999999", b"cat", b"", b"1.5", b"\xff\xfe"])
    files[index] = (files[index][0], bad)
    return files


@_rewritten
def not_a_picture(files, chance):
    index = 2 * chance.randrange(len(files) // 2) + 1
    name, content = files[index]
    files[index] = (name, chance.choice([b"", b"text", content[:60]]))
    return files


def empty_file(path, chance):
    path.write_bytes(b"")


def empty_tar(path, chance):
    write_tar(path, [])


def absent(path, chance):
    path.unlink()


MANIFEST_KINDS = [
    "samples",
    "other labels",
    "label file",
    "no label file",
    "sha256",
    "name",
    "twice",
    "left out",
    "class",
    "type",
    "half",
    "list",
]


def wrong_manifest(path, chance):
    manifest_path = path.parent / "manifest.json"
    if not manifest_path.exists():
        return absent(path, chance)
    manifest = json.loads(manifest_path.read_text())
    shard = chance.choice(manifest["splits"]["train"]["shards"])
    kind = chance.choice(MANIFEST_KINDS)
    if kind == "samples":
        shard["samples"] += chance.choice([-1, 1])
    elif kind == "other labels":
        split = manifest["splits"]["train"]
        labels = np.load(path.parent / split["labels"]["file"])
        place = chance.randrange(len(labels))
        labels[place] = (labels[place] + 1) % 7
        split["labels"] = write_labels(path.parent, "train", [labels], "cls", ["cls", "png"])
    elif kind == "label file":
        changed = path.parent / manifest["splits"]["train"]["labels"]["file"]
        content = changed.read_bytes()
        changed.write_bytes(chance.choice([content[:-4], content[:-1] + b"\1", b""]))
    elif kind == "no label file":
        (path.parent / manifest["splits"]["train"]["labels"]["file"]).unlink()
    elif kind == "sha256":
        shard["sha256"] = "0" * 64
    elif kind == "name":
        shard["name"] = "train-999999.tar"
    elif kind == "twice":
        manifest["splits"]["train"]["shards"].append(shard)
    elif kind == "left out":
        manifest["splits"]["train"]["shards"].remove(shard)
    elif kind == "class":
        manifest["classes"] = manifest["classes"][:3]
    elif kind == "type":
        shard[chance.choice(list(shard))] = chance.choice([None, [], {}, "many", -1])
    elif kind == "list":
        manifest = [manifest]
    text = json.dumps(manifest)
    if kind == "half":
        text = text[: len(text) // 2]
    manifest_path.write_text(text)


KINDS = [
    truncated,
    cut_between_members,
    garbled,
    rotten,
    zeroed,
    missing_member,
    duplicate_key,
    duplicate_member,
    dotted_keys,
    one_dotted_key,
    wrong_label,
    not_a_picture,
    empty_file,
    empty_tar,
    absent,
    wrong_manifest,
]


def judge(
    directory: Path, kind, seed: int, manifest: bool, indexed: bool, policy: str, reader=READERS[0]
) -> str:
    """Make one corrupt set and read it: "refused", "counted" or "harmless".

    Raises AssertionError for anything else.
    """
    chance = random.Random(f"{kind.__name__} {seed}")
    write_uneven(directory, SIZES, manifest, indexed)
    kind(directory / f"train-{chance.randrange(len(SIZES)):06d}.tar", chance)
    settings = {"damage": policy, "damage_share": 0.99, "cache": CACHE[reader]}
    if manifest:
        data = Data(train=str(directory), **settings)
    else:
        pattern = str(directory / "train-{000000..000002}.tar")
        data = Data(train=pattern, classes=len(CLASSES), **settings)
    verdict = measured(directory, data, WORKERS[reader])
    trained(directory, data, verdict)
    return verdict


def measured(directory: Path, data: Data, workers: int) -> str:
    """The verdict of one exact pass."""
    try:
        shards = cached(open_shards(data.train, data, "train"), directory / "cache" / "train", data)
        stream = MeasuringStream(shards, 16)
        batches = list(stream.loader(workers=workers))
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        return "refused"
    delivered = [key for batch in batches for key in intact_keys(shards, batch)]
    assert len(set(delivered)) == len(delivered), "a sample came twice"
    lost = shards.lost + len(stream.lost)
    counts = f"{len(delivered)} delivered, {lost} counted as lost, of {sum(SIZES)}"
    assert len(delivered) + lost == sum(SIZES), counts
    if lost:
        assert data.damage == "skip", f"strict: {counts}"
        return "counted"
    return "harmless"


def trained(directory: Path, data: Data, verdict: str) -> None:
    """Two epochs of training on the same set.

    Only whole batches of intact samples come, or the same refusal.
    """
    try:
        shards = cached(open_shards(data.train, data, "train"), directory / "cache" / "train", data)
        stream = TrainingStream([Source(shards, shuffled(len(shards), 0), 8)], 0)
        batches = list(stream.loader(0, 2 * sum(SIZES) // 8))
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        assert verdict == "refused", f"measuring: {verdict}, training: {error}"
        return
    assert verdict != "refused", "training reads what measuring refuses"
    assert all(len(intact_keys(shards, batch)) == 8 for batch in batches)


def intact_keys(shards, batch) -> list[str]:
    """The batch's keys.  AssertionError if a label or an input is not that of its key."""
    keys = shards.keys(batch.ids.numpy())
    for key, label, inputs in zip(keys, batch.labels.tolist(), batch.inputs.numpy(), strict=True):
        assert label == label_of(int(key)), f"{key} has label {label}"
        assert (inputs[0] == picture(int(key))).all(), f"{key} is garbled"
    return keys


def command(words: list[str], stdin: str = "") -> tuple[int, str]:
    """(exit code, what it printed to stderr) of `trainer WORDS`, run in this process."""
    stderr, before = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            code = trainer_main(words)
    finally:
        sys.stdin = before
    return code, stderr.getvalue()


def judge_commands(directory: Path, manifest: bool, policy: str, verdict: str) -> None:
    """`check` and `shards validate` on a set that `judge` made: exit codes and lines."""
    pattern = str(directory / "train-{000000..000002}.tar")
    data = {"train": pattern, "val": pattern, "test": pattern}
    data |= {"damage": policy, "damage_share": 0.99, "cache": "none"}
    if not manifest:
        data["classes"] = len(CLASSES)
    config = {
        "clusters": {"num_groups": 2},
        "data": data,
        "model": {"name": "mlp", "width": 8, "depth": 1},
        "train": {"steps": 1, "batch_size": 8},
    }
    code, stderr = command(["check"], tomli_w.dumps(config))
    lines = stderr.splitlines(keepends=True)
    stderr = "".join(line for line in lines if not line.startswith("warning: "))
    if stderr:
        assert code == 2, f"check: exit code {code}, {stderr!r}"
        assert stderr.startswith("error: ") and stderr.count("\n") == 1, f"check: {stderr!r}"
    else:
        assert code == 0, f"check: exit code {code}"
    assert verdict == "refused" or code == 0, f"{verdict} by the streams, check says {stderr!r}"
    code, stderr = command(["shards", "validate", str(directory) if manifest else pattern])
    assert code in (0, 1, 2), f"validate: exit code {code}, {stderr!r}"
    assert bool(stderr) == bool(code), f"validate: exit code {code}, {stderr!r}"
    # Without a manifest only the config says how many classes there are: `validate` takes the
    # labels as they come.
    if verdict != "harmless" and manifest:
        assert code, f"{verdict} by the streams, nothing to say for validate"


def timed_out(*_):
    raise AssertionError(f"hangs: not done after {SECONDS} s")


def soak(given: Asked) -> int:
    """Check corrupt sets. Prints a table and the first failures.

    Returns the number of failures.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create")
    signal.signal(signal.SIGALRM, timed_out)
    table: dict[str, dict[str, int]] = {}
    failures = 0
    for number in given.numbers:
        kind = KINDS[number % len(KINDS)]
        seed = number // len(KINDS)
        manifest, indexed, policy = seed % 4 > 0, seed % 8 < 4, ("strict", "skip")[seed // 8 % 2]
        manifest, reader = manifest or not indexed, READERS[seed % 3]
        with tempfile.TemporaryDirectory() as directory:
            signal.alarm(SECONDS)
            try:
                verdict = judge(Path(directory), kind, seed, manifest, indexed, policy, reader)
                judge_commands(Path(directory), manifest, policy, verdict)
            except Exception:
                verdict, failures = "FAILED", failures + 1
                if failures <= 5:
                    print(kind.__name__, seed, manifest, indexed, policy, reader)
                    traceback.print_exc()
            signal.alarm(0)
        row = table.setdefault(kind.__name__, {})
        row[verdict] = row.get(verdict, 0) + 1
    for name, row in table.items():
        print(f"{name:22}", row)
    print(f"corrupt sets {given}: {failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(soak(asked(1000)) > 0)
