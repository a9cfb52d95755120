"""TOML in, checked config out. A mistake is one line that names value, rule and remedy."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from networks import regular

from .base import UserError
from .exclusive import UNSET, replaced_by
from .messages import in_our_words
from .run import Config, ConfigFile
from .schedule import Student

NAMED_MISTAKES = 50  # of a file that is no config of ours at all
OF_SHELL = ("/dev/", "/proc/")  # `referral run <(...)`: a pipe that somebody does write to
# Keys of earlier versions and what they are called now.
RENAMED = {"slurm.combine": "slurm.ensemble"}


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), base: dict | None = None
) -> Config:
    """Read a TOML file (or take `base`), apply `section.key=value` overrides, and check everything.

    Raises UserError with one line per mistake, each naming the value, the rule and the nearest key.
    """
    values = dict(base or {}) if path is None else read_toml(Path(path))
    named = {_key(override) for override in overrides}
    for override in overrides:
        apply_override(values, override, named)
    for old, new in RENAMED.items():
        rename_key(values, old.split("."), new.split("."))
    source = "config" if path is None else str(path)
    _check_text(values, "", source)
    try:
        return ConfigFile.model_validate(values).resolve()
    except ValidationError as errors:
        mistakes = errors.errors()
        lines = [f"{source}: {_explain(error)}" for error in mistakes[:NAMED_MISTAKES]]
        if len(mistakes) > NAMED_MISTAKES:
            lines.append(f"{source}: {len(mistakes) - NAMED_MISTAKES} more mistakes")
        raise UserError("\n".join(lines)) from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{source}: {error}") from None


def save_config(config: Config, path: Path) -> None:
    path.write_text(tomli_w.dumps(config.dump()), encoding="utf-8")


def read_toml(path: Path) -> dict:
    """A TOML file's values.  Raises UserError if it cannot be read."""
    try:
        return tomllib.loads(_text_of(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; give a TOML file") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _check_text(value: Any, key: str, source: str) -> None:
    """UserError for a name that is no text, as bytes of a path may be: no config can hold it."""
    if isinstance(value, dict):
        for name, each in value.items():
            _check_text(each, f"{key}.{name}".lstrip("."), source)
    elif isinstance(value, list):
        for each in value:
            _check_text(each, key, source)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            shown = value.encode("utf-8", "backslashreplace").decode()
            raise UserError(f"{source}: {key} = {shown!r} is no UTF-8; rename it") from None


def _text_of(path: Path) -> str:
    encoding = "utf-8-sig"  # Windows' editors begin a file with a byte order mark
    if str(path).startswith(OF_SHELL):
        return path.read_text(encoding=encoding)
    return regular.read_text(path, encoding)


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def apply_override(values: dict, override: str, named: Collection[str] = ()) -> None:
    """Set one `a.b=value` in nested `values`. The value is TOML, or a bare string.

    A key that cannot stand beside it makes way, unless it is among `named`, the keys that the same
    command line sets.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    key = key.strip()
    *sections, last = key.split(".")
    if not all((*sections, last)):
        raise UserError(f"--set {override}: {key} has an empty part; write section.key=value")
    own = values
    for section in sections:
        own = own.setdefault(section, {})
        if not isinstance(own, dict):
            raise UserError(f"--set {override}: {section} is not a section")
    own[last] = value
    if value not in UNSET:
        for rival in set(replaced_by(key)).difference(named):
            _remove(values, rival.split("."))


def _remove(values: dict, key: list[str]) -> None:
    for section in key[:-1]:
        values = values.get(section, {})
        if not isinstance(values, dict):
            return
    values.pop(key[-1], None)


def rename_key(values: dict, old: list[str], new: list[str]) -> None:
    """Move the value of a key to its new name, where there is none yet."""
    for section in old[:-1]:
        values = values.get(section, {})
    if isinstance(values, dict) and old[-1] in values:
        values.setdefault(new[-1], values.pop(old[-1]))


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested tables as {"section.key": value}. Lists and empty tables are values."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def unknown_to(path: Path, config: Config) -> list[str]:
    """The keys of `config` that a file, which an older version wrote, does not have."""
    written = flat(read_toml(path))
    return [key for key in flat(config.dump()) if key not in written]


def _explain(error: Any) -> str:
    """One of pydantic's errors in our words."""
    keys = [str(part) for part in error["loc"]]
    name = ".".join(keys)
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(keys[:-1])
        near = difflib.get_close_matches(keys[-1].lower(), valid, n=1, cutoff=0.4)
        near = near or [key for key in valid if _initials(key) == keys[-1].lower()]
        hint = f"; valid keys: {', '.join(valid)}"
        if near:
            hint = f"; did you mean {'.'.join([*keys[:-1], near[0]])}?"
        return f"unknown key {name}{hint}"
    message = in_our_words(error)
    if not name:
        return message
    if error["type"] == "value_error" and isinstance(error["input"], dict):  # of keys together
        return f"{name}: {message}"
    return f"{name} = {error['input']!r}: {message}"


def _initials(key: str) -> str:
    """lr of learning_rate"""
    return "".join(word[0] for word in key.split("_"))


def _valid_keys(sections: list[str]) -> list[str]:
    """The keys of a section that is reached by these names."""
    section: Any = ConfigFile
    if sections[:1] == ["students"]:
        return _fields(Student) if len(sections) > 1 else []
    for name in sections:
        section = section.model_fields[name].annotation
    return _fields(section)


def _fields(section: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]
