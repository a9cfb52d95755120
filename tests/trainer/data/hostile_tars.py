"""Tars that somebody made up to harm who reads them, seeded, and what comes of each.

    python tests/trainer/data/hostile_tars.py 60
        reads sixty, each by a process with little memory and time: `make soak`

Each is read by opening (strict and skip), `shards index`, `shards from-webdataset` and `shards
validate`.  It ends in one line that names the shard, or every sample that is delivered is one that
was written, byte for byte, and the others are counted or listed.
"""

import contextlib
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import traceback
import zlib
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import numpy as np  # noqa: E402
import webdataset.writer  # noqa: E402, F401 - here, so that no child imports it
from campaigns import Asked, asked  # noqa: E402
from shardsets import label_of, picture, tar_files, write_tar  # noqa: E402

from pipeline.config import Data, UserError  # noqa: E402
from pipeline.failures import explain  # noqa: E402
from trainer.commands.shards import main as shards_main  # noqa: E402
from trainer.data import open_shards  # noqa: E402
from trainer.data.authoring import indexing  # noqa: E402, F401

GOOD = 12  # samples beside the hostile member
SECONDS = 120  # a reader that takes longer is stuck
MEMORY = 700 << 20  # beyond what the process has before it reads
BLOCK = tarfile.BLOCKSIZE


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **values) -> bytes:
    """Header and content of one member, whatever they say."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, len(content)
    for key, value in values.items():
        setattr(entry, key, value)
    header = entry.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    return header[-BLOCK:] + content + bytes(-len(content) % BLOCK)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return member("pax", records, kind)


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


def sample(key: str, label: bytes = b"1", number: int = 1, **more: bytes) -> bytes:
    content = dict(tar_files([number]))
    picture_file = content[f"{number:05d}.png"]
    files = {"cls": label, "png": picture_file} | more
    return b"".join(member(f"{key}.{extension}", files[extension]) for extension in files)


def picture_file(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and is one row of zeros."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(3 * min(width, 1000) + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch /tmp/executed) (w) file\n"


# Each gives the bytes of hostile members.


def long_name(chance):
    name = b"k" * chance.choice([5000, 900_000, 3_000_000]) + b".png"
    return member("././@LongLink", name + b"\0", tarfile.GNUTYPE_LONGNAME) + sample("hidden")


def long_pax_name(chance):
    name = b"k" * chance.choice([5000, 900_000, 3_000_000]) + b".cls"
    return pax(record(b"path", name)) + member("short.cls", b"1") + sample("hidden")


def chain_of_names(chance):
    one = member("././@LongLink", b"name.png\0", tarfile.GNUTYPE_LONGNAME)
    return one * chance.choice([9, 2000, 20_000]) + sample("hidden")


def chain_of_pax(chance):
    return pax(record(b"path", b"x.png")) * chance.choice([9, 2000, 20_000]) + sample("hidden")


def slow_pax(chance):
    digits = b"3 a" * chance.choice([1000, 300_000])
    return pax(digits + b"=\n") + sample("hidden")


def pile_of_globals(chance):
    records = b"".join(record(b"k%06d" % number, b"v") for number in range(8000))
    return pax(records, tarfile.XGLTYPE) * 12 + sample("hidden")


def many_records(chance):
    records = b"".join(record(b"%x" % number, b"") for number in range(60_000))
    return pax(records) + member("hidden.cls", b"1") + sample("hidden2")


def sparse(chance):
    header = bytearray(member("holes.png", b"", tarfile.GNUTYPE_SPARSE))
    header[482] = 1  # more blocks of the map follow
    extended = bytearray(BLOCK)
    extended[504] = 1
    return bytes(header) + bytes(extended) * chance.choice([1, 5000])


def sparse_by_pax(chance):
    records = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0")
    numbers = b"100000000\n" + b"1\n" * 500_000
    return pax(records) + member("holes.png", numbers)


def large_label(chance):
    return sample("hidden", b"7" * chance.choice([5000, 2_000_000]))


def large_number(chance):
    return sample("hidden", chance.choice([b"400000000", b"9" * 4000, b"-1", b"1e308", b"0x10"]))


def binary_label(chance):
    return sample("hidden", bytes(range(1, 256)))


def deep_json(chance):
    return member("hidden.json", b"[" * 3_000_000) + sample("hidden")


def many_members(chance):
    files = {f"e{number}": b"" for number in range(chance.choice([999, 3000, 40_000]))}
    return sample("hidden", **files)


def lying_size(chance):
    header = bytearray(member("hidden.png", b""))
    size = chance.choice(
        [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-1\0" + bytes(9)]
    )
    header[124:136] = size
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    return bytes(header)


def array_that_promises(chance):
    shape = (chance.choice([10**10, 10**15, 10**30]),)
    said = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(said)) + said.encode()
    return member("hidden.cls", b"1") + member("hidden.npy", head + bytes(64))


def huge_picture(chance):
    width, height = chance.choice([(60_000, 60_000), (2**31 - 1, 1), (13_000, 13_000)])
    return sample("hidden", png=picture_file(width, height))


def postscript(chance):
    return sample("hidden", png=EPS)


def wrong_magics(chance):
    return b"".join(bytes(257) + b"ustar" + bytes(250) for _ in range(5000)) + b"ustar" * 200_000


def zeros_between(chance):
    return b"".join(bytes(BLOCK) + sample(f"lone{number}") for number in range(300))


def links(chance):
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    places = ["/etc/passwd", "../../../etc/passwd", "00001.png"]
    return b"".join(
        member(f"link{number}.png", b"", kind, linkname=chance.choice(places))
        for number, kind in enumerate(kinds)
    )


def climbing_names(chance):
    return sample("../../../tmp/climbs") + sample("/tmp/absolute") + sample("a/../../b")


def control_names(chance):
    return sample("\x1b]0;owned\x07\x1b[2J\nsecond line", b"\x1b[31mred\x1b[0m")


def nothing_readable(chance):
    return os.urandom(200_000)


HOSTILE = [
    long_name,
    long_pax_name,
    chain_of_names,
    chain_of_pax,
    slow_pax,
    pile_of_globals,
    many_records,
    sparse,
    sparse_by_pax,
    large_label,
    large_number,
    binary_label,
    deep_json,
    many_members,
    lying_size,
    array_that_promises,
    huge_picture,
    postscript,
    wrong_magics,
    zeros_between,
    links,
    climbing_names,
    control_names,
    nothing_readable,
]


# Each puts something that is no file where a shard is expected.


def pipe(path: Path):
    os.mkfifo(path)


def directory(path: Path):
    path.mkdir()


def endless(path: Path):
    path.symlink_to("/dev/zero")


def loop(path: Path):
    path.symlink_to(path.name)


NO_FILES = [pipe, directory, endless, loop]


def write(place: Path, hostile, chance: random.Random) -> None:
    """A tar of good samples, a hostile one among them, or what is no file beside a good tar."""
    write_tar(place / "train-000000.tar", tar_files(range(GOOD)))
    if hostile in NO_FILES:
        hostile(place / "train-000001.tar")
        return
    path = place / "train-000001.tar"
    before, behind = io.BytesIO(), io.BytesIO()
    for file, numbers in ((before, range(GOOD, GOOD + 6)), (behind, range(GOOD + 6, 2 * GOOD))):
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, content in tar_files(numbers):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    first = before.getvalue()[: -tarfile.RECORDSIZE].rstrip(b"\0")
    first += bytes(-len(first) % BLOCK)
    parts = [first, hostile(chance), behind.getvalue()]
    if chance.random() < 0.3:
        parts = [hostile(chance), behind.getvalue()]
    path.write_bytes(b"".join(parts))


def check_delivered(shards) -> None:
    """AssertionError unless what is delivered under skip is what was written."""
    ids = np.arange(len(shards))
    inputs, unreadable = shards.read(ids)
    for row, key in enumerate(shards.keys(ids)):
        if row in unreadable or not key.isdigit():
            continue
        number = int(key)
        assert (inputs[row, 0] == picture(number)).all(), key
        assert shards.class_names[shards.labels[row]] == str(label_of(number)), key


def opened(place: Path, damage: str) -> str:
    data = Data(classes=7, damage=damage, damage_share=0.99, cache="none")
    check_delivered(open_shards(f"{place}/train-{{000000..000001}}.tar", data, "train"))
    return "read"


def indexed(place: Path) -> str:
    code = shards_main(["index", str(place), "--damage", "skip"])
    assert code == 0, code
    data = Data(damage="skip", damage_share=0.99, cache="none")
    shards = open_shards(str(place), data, "train")
    check_delivered(shards)
    return "read"


def rewritten(place: Path) -> str:
    pattern = f"{place}/train-{{000000..000001}}.tar"
    out = place / "out"
    code = shards_main(["from-webdataset", pattern, "--out", str(out), "--damage", "skip"])
    assert code == 0, code
    shards = open_shards(str(out), Data(cache="none"), "train")
    shards.inputs(np.arange(len(shards)))
    return "read"


def validated(place: Path) -> str:
    code = shards_main(["validate", f"{place}/train-{{000000..000001}}.tar"])
    return {0: "read", 1: "listed"}[code]


READERS = {
    "strict": lambda place: opened(place, "strict"),
    "skip": lambda place: opened(place, "skip"),
    "index": indexed,
    "from-webdataset": rewritten,
    "validate": validated,
}


def read(place: Path, reader: str) -> str:
    """ "read", "listed" or "refused" in one line. AssertionError for what is worse."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            verdict = READERS[reader](place)
    except (UserError, OSError) as error:
        explained = explain(error)
        assert explained is not None, error
        line = explained[1]
        assert len(line.splitlines()) == 1 and len(line) < 2000, line[:300]
        said.write(line)
        verdict = "refused"
    raw = [c for c in said.getvalue() if (ord(c) < 32 and c not in "\n\t\r") or 127 <= ord(c) < 160]
    assert not raw, raw
    return verdict


def in_a_process(place: Path, reader: str) -> str:
    """`read` in a child of little memory and time."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        signal.alarm(SECONDS)
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        try:
            verdict = read(place, reader)
        except BaseException:
            verdict = traceback.format_exc()
        os.write(into, verdict.encode()[-3000:])
        os._exit(0)
    os.close(into)
    with open(out, "rb") as file:
        verdict = file.read().decode()
    _, status = os.waitpid(child, 0)
    if status:
        return f"ended by signal {status & 127}"
    return verdict


def judge(place: Path, seed: int, hostile=None) -> str:
    """The verdicts of all readers of one hostile tar. AssertionError for what is no verdict."""
    chance = random.Random(seed)
    hostile = hostile or (HOSTILE + NO_FILES)[seed % len(HOSTILE + NO_FILES)]
    verdicts = []
    for reader in READERS:
        folder = place / reader
        folder.mkdir()
        write(folder, hostile, random.Random(seed))
        verdict = in_a_process(folder, reader)
        allowed = ("refused",) if hostile in NO_FILES else ("read", "listed", "refused")
        assert verdict in allowed, f"{hostile.__name__}, seed {seed}, {reader}: {verdict}"
        verdicts.append(verdict)
    assert chance and not os.path.exists("/tmp/executed"), "a picture was executed"
    return " ".join(verdicts)


def soak(given: Asked) -> None:
    verdicts: Counter = Counter()
    for seed in given.numbers:
        with tempfile.TemporaryDirectory() as directory:
            verdicts.update(judge(Path(directory), seed).split())
    print(f"hostile tars {given}, each by {len(READERS)} readers: {json.dumps(verdicts)}")


if __name__ == "__main__":
    soak(asked(60))
