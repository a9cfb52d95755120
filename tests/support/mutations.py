"""Damage to files, seeded: bytes, lengths, and values of JSON files that no version writes."""

import json
import random
import shutil
from pathlib import Path
from typing import Any


def flipped(path: Path, chance: random.Random) -> None:
    """One to three bits, half of them in the first kilobyte, where a header is."""
    content = bytearray(path.read_bytes())
    most = len(content) if chance.random() < 0.5 else min(len(content), 1024)
    for _ in range(chance.randint(1, 3)):
        content[chance.randrange(most)] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def emptied(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def exchanged(path: Path, chance: random.Random) -> None:
    """Another file's content, of the same bundle."""
    others = [each for each in files_beside(path) if each != path]
    shutil.copyfile(chance.choice(others), path)


def removed(path: Path, chance: random.Random) -> None:
    path.unlink()


def a_directory(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def longer(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 64)))


def lying_header(path: Path, chance: random.Random) -> None:
    """Of safetensors: another length of the header, or values that do not fit the file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if path.suffix != ".safetensors" or chance.random() < 0.3:
        wrong = chance.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        path.write_bytes(wrong.to_bytes(8, "little") + content[8:])
        return
    try:
        header = replaced(json.loads(content[8 : 8 + size]), chance)
    except ValueError:
        return flipped(path, chance)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def of_another_form(path: Path, chance: random.Random) -> None:
    """One or two values of a JSON file replaced. Of another file, its header's."""
    if path.suffix != ".json":
        return lying_header(path, chance)
    values = json.loads(path.read_text())
    for _ in range(chance.randint(1, 2)):
        values = replaced(values, chance)
    path.write_text(json.dumps(values) if not isinstance(values, str) else values)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**15, 2**31, 2**53, 2**63, -(2**63), 10**30, 0.5, -0.5,
    1e-320, 1e308, float("nan"), float("inf"), "", "x", "\0", "kl", "os:system", "timm:resnet18",
    "../../x", "pipe:touch EXECUTED", [], [[]], {}, {"a": 1}, [0] * 50, [-1], [1e9], ["x"], [None],
]  # fmt: skip


def replaced(values: Any, chance: random.Random) -> Any:
    """The values with one of them another, gone, twice, or called otherwise."""
    if not isinstance(values, (dict, list)) or not values or chance.random() < 0.05:
        return nested(500) if chance.random() < 0.1 else chance.choice(STRANGE)
    keys = list(values) if isinstance(values, dict) else list(range(len(values)))
    key = chance.choice(keys)
    if chance.random() < 0.6:
        values[key] = replaced(values[key], chance)
    elif chance.random() < 0.4:
        del values[key]
    elif isinstance(values, dict):
        values[f"{key}_"] = values.pop(key)
    else:
        values.insert(key, values[key])
    return values


DAMAGES = [flipped, cut, emptied, exchanged, removed, a_directory, longer]
DAMAGES += [lying_header, of_another_form, of_another_form, of_another_form, of_another_form]


def files_beside(path: Path) -> list[Path]:
    """The files of the directory of a bundle or a run that a file is in."""
    roots = ("ensemble.json", "config.toml")
    root = next(each for each in path.parents if any((each / name).exists() for name in roots))
    return sorted(each for each in root.rglob("*") if each.is_file())


def damaged_file(files: list[Path], chance: random.Random) -> str:
    """Damage one of the files, which, and how."""
    path, damage = chance.choice(files), chance.choice(DAMAGES)
    damage(path, chance)
    return f"{path} {damage.__name__}"
