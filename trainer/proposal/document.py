"""Settings as a commented TOML file."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from .settings import Setting

COLUMNS = 100
ALIGNED = 40  # comments begin here, where what they are about is shorter


def document(header: Sequence[str], settings: Sequence[Setting]) -> str:
    """The text of a config: the header as comments, then every key with its reason.

    Keys of one section stand together in `settings`.
    """
    lines = [f"# {line}".rstrip() for line in header]
    for section, keys in groupby(settings, key=lambda setting: setting.section):
        lines.append("")
        if section:
            lines.append(f"[{section}]")
        for setting in keys:
            lines += _lines(setting)
    return "\n".join(lines) + "\n"


def _lines(setting: Setting) -> list[str]:
    key = setting.key.rpartition(".")[2]
    assigned = f"{key} = {toml(setting.value)}"
    if "\n" not in assigned and len(assigned) < ALIGNED:
        line = f"{assigned:<{ALIGNED}}# {setting.why}"
        if len(line) <= COLUMNS:
            return [line]
    comment = textwrap.wrap(setting.why, COLUMNS - 2)
    return [*(f"# {line}" for line in comment), *assigned.split("\n")]


def toml(value: Any) -> str:
    """A value as TOML writes it.  Long lists take several lines."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{toml_key(key)} = {toml(item)}" for key, item in value.items())
        return f"{{ {pairs} }}"
    if isinstance(value, list):
        return _list(value)
    if isinstance(value, float) and value.is_integer():
        return f"{value:.1f}" if abs(value) < 1e15 else repr(value)
    return repr(value)


def toml_key(key: str) -> str:
    is_bare = key.replace("_", "").replace("-", "").isalnum() and key.isascii()
    return key if is_bare else json.dumps(key)


def _list(values: list) -> str:
    line = f"[{', '.join(map(toml, values))}]"
    if len(line) <= COLUMNS - 10:
        return line
    rows = textwrap.wrap(", ".join(map(toml, values)), COLUMNS - 4, break_on_hyphens=False)
    return "[\n" + "\n".join(f"    {row}" for row in rows) + ",\n]"
