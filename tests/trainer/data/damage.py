"""Damaged shard sets, seeded, and the judgement on how they are met.

`python tests/trainer/data/damage.py 1000` judges a thousand of them: `make soak`.
"""

import json
import random
import sys
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3])]

from shardsets import CLASSES, label_of, members_of, picture, write_tar, write_uneven  # noqa: E402

from trainer.config import Data, UserError  # noqa: E402
from trainer.data import MeasuringStream, open_shards  # noqa: E402

SIZES = [5, 40, 12]


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


def zeroed(path, chance):
    content = bytearray(path.read_bytes())
    start = 512 * chance.randrange(0, len(content.rstrip(b"\0")) // 512)
    length = min(chance.choice([512, 4096]), len(content) - start)
    content[start : start + length] = bytes(length)
    path.write_bytes(content)


def _rewritten(change):
    def damage(path, chance):
        members = members_of(numbers_of(int(path.stem[-6:])))
        write_tar(path, change(members, chance))

    damage.__name__ = change.__name__
    return damage


@_rewritten
def missing_member(members, chance):
    del members[chance.randrange(len(members))]
    return members


@_rewritten
def duplicate_key(members, chance):
    place = 2 * chance.randrange(len(members) // 2)
    return members + members[place : place + 2]


@_rewritten
def duplicate_member(members, chance):
    place = chance.randrange(len(members))
    return members[:place] + [members[place]] + members[place:]


@_rewritten
def dotted_keys(members, chance):
    return [(f"img.{name}", content) for name, content in members]


@_rewritten
def one_dotted_key(members, chance):
    place = 2 * chance.randrange(len(members) // 2 - 1)
    key = members[place][0].partition(".")[0]
    return [
        (f"{key}.v2.{n.partition('.')[2]}" if place + 2 <= i < place + 4 else n, c) for i, (n, c) in enumerate(members)
    ]


@_rewritten
def wrong_label(members, chance):
    place = 2 * chance.randrange(len(members) // 2)
    bad = chance.choice([b"7", b"-1", b"99999999999999999999", b"cat", b"", b"1.5", b"\xff\xfe"])
    members[place] = (members[place][0], bad)
    return members


@_rewritten
def not_a_picture(members, chance):
    place = 2 * chance.randrange(len(members) // 2) + 1
    members[place] = (members[place][0], chance.choice([b"", b"text", members[place][1][:60]]))
    return members


def empty_file(path, chance):
    path.write_bytes(b"")


def empty_tar(path, chance):
    write_tar(path, [])


def absent(path, chance):
    path.unlink()


def wrong_manifest(path, chance):
    manifest_path = path.parent / "manifest.json"
    if not manifest_path.exists():
        return absent(path, chance)
    manifest = json.loads(manifest_path.read_text())
    shard = chance.choice(manifest["splits"]["train"]["shards"])
    kind = chance.choice(["samples", "counts", "sha256", "name", "half", "class"])
    if kind == "samples":
        shard["samples"] += chance.choice([-1, 1])
    elif kind == "counts":
        shard["class_counts"][chance.choice(list(shard["class_counts"]))] += 1
    elif kind == "sha256":
        shard["sha256"] = "0" * 64
    elif kind == "name":
        shard["name"] = "train-999999.tar"
    elif kind == "class":
        manifest["classes"] = manifest["classes"][:3]
    text = json.dumps(manifest)
    manifest_path.write_text(text[: len(text) // 2] if kind == "half" else text)


KINDS = [
    truncated, cut_between_members, garbled, zeroed, missing_member, duplicate_key, duplicate_member, dotted_keys,
    one_dotted_key, wrong_label, not_a_picture, empty_file, empty_tar, absent, wrong_manifest,
]  # fmt: skip


def judge(directory: Path, kind, seed: int, manifest: bool, indexed: bool, policy: str) -> str:
    """Make one damaged set and read it: "refused", "counted" or "harmless".  AssertionError for anything else."""
    chance = random.Random(f"{kind.__name__} {seed}")
    write_uneven(directory, SIZES, manifest, indexed)
    kind(directory / f"train-{chance.randrange(len(SIZES)):06d}.tar", chance)
    data = Data(classes=None if manifest else len(CLASSES), damage=policy, damage_share=0.99, cache="none")
    pattern = str(directory) if manifest else str(directory / "train-{000000..000002}.tar")
    try:
        shards = open_shards(pattern, data, "train")
        stream = MeasuringStream(shards, 16)
        batches = list(stream.loader())
    except UserError as mistake:
        assert len(str(mistake).splitlines()) == 1, str(mistake)
        return "refused"
    delivered = 0
    for batch in batches:
        keys = shards.keys(batch.ids.numpy())
        for key, label, inputs in zip(keys, batch.labels.tolist(), batch.inputs.numpy(), strict=True):
            assert label == label_of(int(key)), f"{key} has label {label}"
            assert (inputs[0] == picture(int(key))).all(), f"{key} is garbled"
            delivered += 1
    assert len({key for batch in batches for key in shards.keys(batch.ids.numpy())}) == delivered, "a sample came twice"
    lost = shards.lost + len(stream.lost)
    assert delivered + lost == sum(SIZES), f"{delivered} delivered, {lost} counted as lost, of {sum(SIZES)}"
    if lost:
        assert policy == "skip", f"strict delivered {delivered} and lost {lost}"
        return "counted"
    return "harmless"


def soak(count: int) -> int:
    """Judge `count` damaged sets; prints a table and the first failures.  Returns the number of failures."""
    table: dict[str, dict[str, int]] = {}
    failures = 0
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        seed, variant = divmod(number, len(KINDS))
        manifest, indexed, policy = seed % 4 > 0, seed % 8 < 4, ("strict", "skip")[seed // 8 % 2]
        with tempfile.TemporaryDirectory() as place:
            try:
                verdict = judge(Path(place), kind, seed, manifest or not indexed, indexed, policy)
            except Exception:
                verdict, failures = "FAILED", failures + 1
                if failures <= 5:
                    print(kind.__name__, seed, manifest, indexed, policy)
                    traceback.print_exc()
        row = table.setdefault(kind.__name__, {})
        row[verdict] = row.get(verdict, 0) + 1
    for name, row in table.items():
        print(f"{name:22}", row)
    print(f"{count} damaged sets, {failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(min(soak(int(sys.argv[1]) if len(sys.argv) > 1 else 1000), 1))
