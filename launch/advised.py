"""Go on in a run with the lever that its advice chose.

RUN/advised.toml is the config that was advised on: RUN/config.toml is another one once a run went
on with a lever.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tomli_w

from pipeline.advice.levers import LEVERS
from pipeline.config import Config, UserError, load_config
from pipeline.files import damaged, holds, picking_from
from pipeline.graph import RunDirectory
from pipeline.store import read_json, write_text

ADVISED_ON = "advised.toml"
OF_NO_LEVER = ("advise", "engine", "launch", "slurm")  # sections that may change in between


def save_advised_on(config: Config, root: Path) -> None:
    """RUN/advised.toml. Not touched if it says the same already."""
    path, text = root / ADVISED_ON, tomli_w.dumps(config.dump())
    if not holds(path, text):
        write_text(path, text)


def config_before(root: Path) -> Config:
    """RUN's config. Where the run went on with a lever of its advice, the one before that."""
    current = load_config(root / "config.toml")
    if not (root / ADVISED_ON).is_file():
        return current
    before = load_config(root / ADVISED_ON)
    kept = {section: getattr(current, section) for section in OF_NO_LEVER}
    before = before.model_copy(update=kept)
    run = RunDirectory(root, before)
    entries = _entries(run)
    for lever in run.advice.levers:
        if run.advice.config_with(lever, entries.get(lever)) == current:
            return before
    return current


class ToAdvise(NamedTuple):
    """config: under which an advice is given in RUN.  about: the one that it is about.

    goes_back: whether RUN takes back what a lever of the last advice set.
    """

    config: Config
    about: Config
    goes_back: bool = False


def configs_to_advise(root: Path, overrides: Sequence[str]) -> ToAdvise:
    """A run that went on with a lever stays as it is, unless that set what pilots read."""
    before = load_config(None, overrides, config_before(root).dump())
    current = load_config(root / "config.toml", overrides)
    if _pilots(root, before) == _pilots(root, current):
        return ToAdvise(current, before)
    return ToAdvise(before, before, goes_back=True)


def _pilots(root: Path, config: Config) -> dict[str, str]:
    """The key of each pilot."""
    return {stage.place: stage.key for stage in RunDirectory(root, config).advice.pilots}


def _entries(run: RunDirectory) -> dict[str, dict]:
    """The levers of the last advice by their names. None before there was one."""
    stage = run.advice.advice
    if stage.done() is None:
        return {}
    path = stage.path("advice.json")
    try:
        with picking_from(path):
            return {entry["name"]: entry for entry in read_json(path)["levers"]}
    except FileNotFoundError:
        raise damaged(path, "it is gone") from None


def config_as_advised(run: RunDirectory) -> tuple[str, Config]:
    """The lever that is best, and the config of the run that goes on with it.

    Raises UserError where there is no advice, or one that was given on something else.
    """
    stage = run.advice.advice
    again = f"referral advise {shlex.quote(str(run.root))}"
    if stage.done() is None:
        raise UserError(f"{run.root} has no advice yet, which --advised goes on with: {again}")
    if not stage.is_done:
        raise UserError(
            f"{run.root}/advice.json was given on another config or other data, and --advised goes "
            f"on with what holds now: {again}"
        )
    path = stage.path("advice.json")
    with picking_from(path):
        best = read_json(path)["best"]
        if best not in LEVERS:
            raise damaged(path, f"best = {best!r} is no lever")
        return best, run.advice.config_with(best, _entries(run).get(best))
