"""Put what no version writes in the place of a run's file, as somebody who hands a run on may.

    python tests/trust/strange_runs.py [FILES] [--first NUMBER] [--seed SEED]

Named pipes, devices, loops of links, files of a terabyte, arrays that unpack to gigabytes or hold
objects, headers that lie, JSON with a key twice, with NaN, of a million brackets.  DONE lists the
file as it was, or as it is now, or has no checksums, as in older runs.  Every command ends within
LIMIT_S in its answer or in lines that name the file.  It executes nothing and takes no memory
beyond MEMORY_BYTES.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from bits import behind, forget, owner_of  # noqa: E402
from older import READERS, by_launcher, by_trainer, without_checksums  # noqa: E402
from small import (  # noqa: E402
    Asked,
    Count,
    Outcome,
    asked,
    command,
    finished,
    in_child,
    run_at,
    small_config,
    workshop,
)

from networks.checksums import entry_of  # noqa: E402
from pipeline.config import Config  # noqa: E402
from pipeline.failures import answer  # noqa: E402

LIMIT_S = 120
MEMORY_BYTES = 8 << 30  # of addresses
TERABYTE = 1 << 40
COMMANDS = READERS | {
    "report": lambda root, config, out: by_trainer(["report", "--run", str(root)]),
    "cancel": lambda root, config, out: by_launcher(["cancel", str(root)]),
    "run --dry-run": lambda root, config, out: by_launcher(
        ["run", "--run", str(root), "--dry-run"]
    ),
}
CHECKSUMS = ("as it was", "as it is", "none")


class Executes:
    """What a pickle of it does when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# What takes a file's place: (the file, a place for what it may execute, chance)


def a_pipe(path: Path, mark: Path, chance: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def a_device(path: Path, mark: Path, chance: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_loop(path: Path, mark: Path, chance: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def a_directory(path: Path, mark: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def a_terabyte(path: Path, mark: Path, chance: random.Random) -> None:
    os.truncate(path, TERABYTE)


def nothing(path: Path, mark: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def half(path: Path, mark: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def no_text(path: Path, mark: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    place = chance.randrange(len(content) + 1)
    path.write_bytes(content[:place] + b"\xff\xfe\x00" + content[place:])


def odd_names(path: Path, mark: Path, chance: random.Random) -> None:
    """Names beside it that no encoding has, or that are two lines, and a link to itself."""
    beside = os.fsencode(path.parent)
    for name in (b"\xff\xfe.json", b"a\nb.json", b"step-\xff"):
        with open(os.path.join(beside, name), "wb"):
            pass
    os.symlink(b"loop", os.path.join(beside, b"loop"))


def twice(path: Path, mark: Path, chance: random.Random) -> None:
    """A key of a JSON object once more, with another value."""
    text = path.read_text()
    key = json.dumps(next(iter(json.loads(text)), "a"))
    path.write_text(text.rstrip().rstrip("}").rstrip() + f", {key}: 1}}")


def not_finite(path: Path, mark: Path, chance: random.Random) -> None:
    """Every number of a JSON file NaN, or infinite."""
    word = chance.choice([float("nan"), float("inf"), float("-inf")])

    def changed(value):
        if isinstance(value, dict):
            return {key: changed(each) for key, each in value.items()}
        if isinstance(value, list):
            return [changed(each) for each in value]
        return word if isinstance(value, float) else value

    path.write_text(json.dumps(changed(json.loads(path.read_text()))))


def deep(path: Path, mark: Path, chance: random.Random) -> None:
    opening = chance.choice(["[", '{"a":'])
    path.write_text(opening * 1_000_000)


def _arrays(path: Path, content: Callable[[str], bytes], method: int) -> None:
    """The file with every array of it of other content."""
    if path.suffix == ".npy":
        path.write_bytes(content(path.name))
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in names:
            archive.writestr(name, content(name))


def _header(descr: str, shape: str) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def a_bomb(path: Path, mark: Path, chance: random.Random) -> None:
    zeros = bytes(1 << 24)
    if path.suffix == ".npy":
        return lying_shape(path, mark, chance)
    with zipfile.ZipFile(path) as archive:
        name = archive.namelist()[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(name, "w", force_zip64=True) as member:
            member.write(_header("'|u1'", f"({200 << 24},)"))
            for _ in range(200):
                member.write(zeros)


def lying_shape(path: Path, mark: Path, chance: random.Random) -> None:
    shape = chance.choice(["(1099511627776,)", "(-1,)", "(9223372036854775807, 4)", "(3, 'x')"])
    header = _header("'<f4'", shape)
    _arrays(path, lambda name: header + bytes(64), zipfile.ZIP_STORED)


def objects(path: Path, mark: Path, chance: random.Random) -> None:
    content = pickle.dumps([Executes(mark)])
    _arrays(path, lambda name: _header("'|O'", "(1,)") + content, zipfile.ZIP_STORED)


def other_shapes(path: Path, mark: Path, chance: random.Random) -> None:
    """Arrays that are whole, and not what they should be."""
    array = chance.choice([np.zeros(0), np.zeros((2, 2)), np.array("text"), np.full(7, np.nan)])
    file = io.BytesIO()
    np.save(file, array)
    _arrays(path, lambda name: file.getvalue(), zipfile.ZIP_STORED)


ANY = [a_pipe, a_device, a_loop, a_directory, a_terabyte, nothing, half, no_text, odd_names]
OF = {
    ".json": [twice, not_finite, deep, *ANY],
    ".npz": [a_bomb, lying_shape, objects, other_shapes, *ANY],
    ".npy": [lying_shape, objects, other_shapes, *ANY],
}


def main(given: Asked) -> int:
    count = Count("strange files of runs", given)
    with workshop() as (place, data):
        config = small_config(data)
        finished(place / "whole", config)
        for trial in given.trials:
            judge(count, trial, random.Random(f"{given.seed} {trial}"), place, config)
    return count.report()


def judge(count: Count, trial: int, rng: random.Random, place: Path, config: Config) -> None:
    """One file, one command."""
    root, mark, out = place / "run", place / "EXECUTED", place / "out"
    shutil.copytree(place / "whole", root, symlinks=True)
    run = run_at(root, config)
    path = victim(root, rng)
    owner = owner_of(run, path)
    known = rng.choice(CHECKSUMS)
    if known == "none":
        without_checksums(root)
    change = rng.choice(OF.get(path.suffix, ANY))
    if owner is not None and rng.random() < 0.4:
        name, reader = "run", partial(command, root, config)
        forget(behind(run, owner))
    else:
        name = rng.choice(list(COMMANDS))
        reader = partial(answer, partial(COMMANDS[name], root, config, out), [root])
    try:
        change(path, mark, rng)
    except (ValueError, TypeError):  # it is no such object
        nothing(path, mark, rng)
    if known == "as it is" and path.is_file() and path.stat().st_size < TERABYTE:
        list_again(path, root)
    outcome = in_child(partial(limited, reader), LIMIT_S)
    said = f"{trial}: {name}, {change.__name__} in place of {path.relative_to(place)}, {known}"
    count.add(end_of(name, outcome, path, mark), said, outcome.text)
    shutil.rmtree(root)
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(mark, ignore_errors=True)


def victim(root: Path, rng: random.Random) -> Path:
    """One of the files. Names that many have are not likelier."""
    by_name: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            by_name.setdefault(path.name, []).append(path)
    return rng.choice(by_name[rng.choice(sorted(by_name))])


def list_again(path: Path, root: Path) -> None:
    """Let the manifest that lists a file list it as it is now."""
    for done in root.rglob("DONE"):
        if done == path:
            continue
        content = json.loads(done.read_text())
        files = content.get("files") or {}
        name = os.path.relpath(path, done.parent)
        if name not in files:
            continue
        files[name] = entry_of(path)
        text = json.dumps(content)
        done.unlink()
        done.write_text(text)
        shown = done.parent.parent.parent / "DONE"
        if shown.exists() and json.loads(shown.read_text())["attempt"] == content["attempt"]:
            shown.unlink()
            shown.write_text(text)


def limited(reader: Callable[[], int]) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    return reader()


def end_of(name: str, outcome: Outcome, path: Path, mark: Path) -> str:
    if mark.exists():
        return "executed"
    if outcome.code == -14:
        return "stuck"
    if outcome.is_traceback:
        return "traceback"
    if "out of memory" in outcome.text:
        return "stuck"
    if outcome.code == 0:
        return "went on"
    if name == "doctor" and any(line.startswith("MISSING") for line in outcome.text.splitlines()):
        return "one line"
    names = (path.name, str(path.parent), "no checksums", "DONE")
    if not outcome.errors or not any(name in outcome.text for name in names):
        return "stuck"
    return "one line"


if __name__ == "__main__":
    sys.exit(main(asked(300)))
