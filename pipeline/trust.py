"""Whether what a run's config names may be executed: docs/security.md has the rule.

A run directory may have been received, and is data then.  Its config can name functions to import,
commands to read shards from, and options and a script for Slurm.  They run if the user wrote them:
on the command line, in the config that it names, or in a run that was laid out here.  Of the latter
there is a record outside of the run: one empty file for each, named by a hash of RUN's path, the
key and the value.  For all others there is --trust.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from .config import Config, UserError
from .config.loading import flat
from .files import home, write_bytes
from .graph import RunDirectory

FUNCTION, COMMAND, SLURM = "a function to import", "a command to run", "something for Slurm to run"
EVERYTHING = (FUNCTION, COMMAND, SLURM)
RECORDS = "referral/trusted"  # below $XDG_STATE_HOME or ~/.local/state
SITE = "site.sh"
# Keys whose values have colons and are no functions.
PATTERNS = ("train", "val", "test", "transfer", "ood", "manifest", "label")
NO_FUNCTIONS = frozenset(f"data.{name}" for name in PATTERNS)
# Keys that name functions, whatever their values look like.
NAME_FUNCTIONS = (".augment", "model.name")
DECODERS = "data.decoders."
HELP = "run the code that the run's config names, though the run was not made here"


class Code(NamedTuple):
    """What a key of the config, or RUN/site.sh, would have executed.  kind: one of EVERYTHING."""

    kind: str
    key: str
    value: str


def code_in(config: Config) -> list[Code]:
    """All that a config names to be executed.  What only looks like it counts, too."""
    return [code for key, value in flat(config.dump()).items() for code in code_of_key(key, value)]


def code_of_key(key: str, value: object) -> list[Code]:
    """What one key of a config names.  value: text, a list or a table."""
    kinds = ((_kind(key, text), text) for text in _texts(value))
    return [Code(kind, key, text) for kind, text in kinds if kind]


def _kind(key: str, text: str) -> str:
    if key.startswith("slurm.") and key.endswith(".extra"):
        return SLURM
    if any(part.strip().startswith("pipe:") for part in text.split("::")):
        return COMMAND
    if key.startswith(DECODERS):
        return FUNCTION
    if ":" not in text or text.startswith("timm:") or key in NO_FUNCTIONS:
        return ""
    if "/" in text and not key.endswith(NAME_FUNCTIONS):
        return ""
    return FUNCTION


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def code_of(run: RunDirectory, kinds: Collection[str] = EVERYTHING) -> list[Code]:
    """All that is executed where the run's stages are, as far as it is of these kinds."""
    code = code_in(run.config)
    site = run.root / SITE
    if SLURM in kinds and site.is_file():
        code.append(Code(SLURM, SITE, hashlib.sha256(site.read_bytes()).hexdigest()))
    return [each for each in code if each.kind in kinds]


def check_trusted(
    run: RunDirectory,
    trusted: bool,
    kinds: Collection[str] = EVERYTHING,
    named: Collection[Code] = (),
) -> None:
    """Raises UserError, one line, for what is neither the user's own nor trusted.

    trusted: whether the command line says --trust.  kinds: what the command may execute.  named:
    what the user named in this command.
    """
    if trusted:
        return
    for code in code_of(run, kinds):
        if code not in named and not _is_recorded(run.root, code):
            value = "" if code.key == SITE else f" = {code.value!r}"
            raise UserError(
                f"{run.root} was not made here by you, and its {code.key}{value} is {code.kind}, "
                "which may do whatever you may; look at it, and if you trust it add --trust"
            )


def record(run: RunDirectory) -> None:
    """Note that all which the run names is the user's own, where a home directory can hold that."""
    directory = _records()
    try:
        for code in code_of(run):
            if directory is not None and not _is_recorded(run.root, code):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_bytes(directory / _digest(run.root, code), b"")
    except OSError:  # a home that cannot be written: --trust says it each time
        pass


def _is_recorded(root: Path, code: Code) -> bool:
    directory = _records()
    return directory is not None and (directory / _digest(root, code)).is_file()


def _records() -> Path | None:
    if given := os.environ.get("XDG_STATE_HOME"):
        return Path(given) / RECORDS
    own = home()
    return None if own is None else own / ".local/state" / RECORDS


def _digest(root: Path, code: Code) -> str:
    words = [os.path.realpath(root), code.key, code.value]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]
