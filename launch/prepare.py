"""Check everything that can be checked without torch, then lay out RUN.

An error leaves nothing behind.
"""

from __future__ import annotations

import glob
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tomli_w
from braceexpand import braceexpand

from pipeline.choices import ENGINES
from pipeline.config import (
    Config,
    ResolvedSpecialists,
    ResolvedStudent,
    Section,
    UserError,
    check_batch_size,
    flat,
    load_config,
)
from pipeline.config.loading import unknown_to
from pipeline.failures import cannot_write
from pipeline.files import holds, probe, sweep, sync_upwards
from pipeline.graph import RunDirectory
from pipeline.identity import is_saved_network
from pipeline.label_set import SPLITS, num_classes
from pipeline.redaction import redacted
from pipeline.store import UNCHECKED, Stage, write_json, write_text
from pipeline.trust import record
from pipeline.version import VERSION

from .aims import RUN, Aim
from .machine import num_cores
from .plan import Job, save_graph

AnySection = TypeVar("AnySection", bound=Section)

OF_NO_STAGE = ("engine.", "launch.", "slurm.")  # keys on which no stage's metrics depend
PACKAGES = (
    "pydantic",
    "typer",
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    *(engine.package for engine in ENGINES.values() if engine.package),
    "webdataset",
    "safetensors",
    "timm",
    "pillow",
)


def check(
    config: Config,
    root: Path,
    force: bool = False,
    beside: tuple[str, ...] = (),
    aim: Aim = RUN,
) -> tuple[RunDirectory, list[Stage]]:
    """The run that `config` makes of RUN, and the stages that another config made there.

    force: those stages may be redone.  beside: names that a directory that is no run yet may hold.
    aim: what is asked for, whose stages count beside the run's.
    Nothing is written.  Raises UserError for whatever can be known to be wrong without torch.
    """
    config = absolute(config)
    check_lengths(config)
    check_data(config)
    check_place(root, beside)
    run = RunDirectory(root, config)
    run.method.check(*num_classes(run.config))
    aim.check(run)
    own = [] if aim.spares_run else run.stages
    known = {stage.place for stage in own}
    further = [stage for stage in aim.stages(run) if stage.place not in known]
    stale = _stale_stages([*own, *further])
    # An advice costs seconds: it is given anew wherever what it is asked for changes.
    dear = [stage for stage in stale if stage.name != "advice"]
    if dear and not force:
        raise UserError(_explain_stale(run, dear))
    return run, stale


def check_batches(run: RunDirectory, jobs: list[Job], stale: list[Stage]) -> None:
    """Every batch that is still to be trained on can be divided among the ranks of its job."""
    redone = {stage.place for stage in stale}
    for job in jobs:
        for stage in job.stages:
            to_train = stage.kind.trains and (not stage.is_done or stage.place in redone)
            if to_train and not (stage.name == "generalist" and _is_given(run.config)):
                schedule = run.schedule(stage)
                check_batch_size(schedule.batch_size, job.processes, schedule.accumulation)


def _is_given(config: Config) -> bool:
    """Whether the generalist comes whole. The trainer finds out whether a file's head fits."""
    given = config.generalist
    if not given.init or given.has_new_head:
        return False
    return given.head is not None or is_saved_network(given.init)


def check_file_system(root: Path) -> None:
    """RUN's file system can do what finishing a stage needs. Nothing of the trial is left."""
    probe(next(path for path in (root, *root.absolute().parents) if path.is_dir()))


def mend(run: RunDirectory, jobs: list[Job]) -> list[str]:
    """Put right what a kill or a power loss left of an earlier launch.

    Temporaries of dead processes go, and done stages show their files.  Returns a line for each
    stage that is done again, since its files are not whole.
    """
    if not run.root.is_dir():
        return []
    sweep(run.root)
    stages = [stage for job in jobs for stage in job.stages]
    try:
        for stage in stages:
            stage.link()
    except OSError as error:
        raise cannot_write(run.root, error) from None
    return [
        f"{stage.place} is done again, for its files are not whole: {stage.lacks}"
        for stage in stages
        if stage.lacks
    ]


def lay_out(
    run: RunDirectory, jobs: list[Job], stale: list[Stage], unchecked: bool = False
) -> None:
    """Clear the stale stages and write config.toml and graph.json.

    What says the same already is not touched.  unchecked: the first job is to try the networks.
    """
    try:
        for stage in reversed(stale):  # what stands behind goes first
            stage.clear()
        text = tomli_w.dumps(run.config.dump())
        path = run.root / "config.toml"
        if not holds(path, text):
            write_text(path, text)
        save_graph(jobs, run.root / "graph.json")
        record(run)
        if unchecked:
            write_text(run.root / UNCHECKED, "the first job tries the networks of this run\n")
        sync_upwards(run.root.absolute(), run.root.absolute().parent)
    except OSError as error:
        raise cannot_write(run.root, error) from None


# Paths


def absolute(config: Config) -> Config:
    """The config with its paths made absolute: a run may be looked at and resumed from anywhere."""
    data = config.data
    patterns = [*SPLITS, "transfer", "ood"]
    if data.manifest:
        patterns.append("manifest")
    students = {name: _with_absolute_teacher(each) for name, each in config.students.items()}
    return config.model_copy(
        update={
            "data": data.model_copy(
                update={name: _absolute_pattern(getattr(data, name)) for name in patterns}
            ),
            "clusters": _with_absolute(config.clusters, "groups_file"),
            "generalist": _with_absolute(config.generalist, "init"),
            "extend": _with_absolute(config.extend, "run"),
            "specialists": _with_absolute_start(config.specialists),
            "ensemble": config.ensemble.model_copy(
                update={"networks": [os.path.abspath(path) for path in config.ensemble.networks]}
            ),
            "students": students,
        }
    )


def _with_absolute(section: AnySection, key: str) -> AnySection:
    """A section with the path of one key made absolute, if it is set."""
    path = getattr(section, key)
    if not path:
        return section
    return section.model_copy(update={key: os.path.abspath(path)})


def _with_absolute_teacher(student: ResolvedStudent) -> ResolvedStudent:
    """A teacher is a path, or a name in this run."""
    if os.sep not in student.teacher:
        return student
    return _with_absolute(student, "teacher")


def _with_absolute_start(specialists: ResolvedSpecialists) -> ResolvedSpecialists:
    """What specialists start as is a path, or a network of this run."""
    if not specialists.given_start:
        return specialists
    return _with_absolute(specialists, "start")


def _absolute_pattern(pattern: str) -> str:
    sources = [source for source in pattern.split("::") if source]
    return "::".join(
        source if _is_remote(source) else os.path.abspath(source) for source in sources
    )


def _is_remote(source: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*:", source) is not None


# Checks


def check_lengths(config: Config) -> None:
    schedules = {"train": config.train, "specialists": config.specialists}
    schedules |= {f"students.{name}": student for name, student in config.students.items()}
    for name, schedule in schedules.items():
        if schedule.steps is None and schedule.epochs is None:
            raise UserError(f"{name}: say how long to train; set {name}.steps or {name}.epochs")


def check_data(config: Config) -> None:
    """Every pattern names files that exist.  What is in them, the trainer checks."""
    errors = [error for split in SPLITS for error in _errors_of(split, getattr(config.data, split))]
    if errors:
        raise UserError("\n".join(errors))


def _errors_of(split: str, pattern: str) -> list[str]:
    """What is wrong with the pattern of a split's shards."""
    if not pattern:
        return [f"data.{split} is empty; give the pattern of its shards, or their directory"]
    local = [source for source in pattern.split("::") if source and not _is_remote(source)]
    errors = [_error_of(source, split) for source in local]
    return [f"data.{split} = {pattern!r}: {error}" for error in errors if error]


def _error_of(source: str, split: str) -> str:
    """What is wrong with one local source of shards. Empty if nothing is."""
    path = Path(source)
    if path.is_dir():
        if (path / "manifest.json").is_file() or any(path.glob(f"{split}*.tar")):
            return ""
        return f"{path} holds neither a manifest.json nor {split}*.tar"
    if path.is_file():
        return ""
    try:
        names = list(braceexpand(source))
    except ValueError:
        return "the braces do not match"
    if any(os.path.exists(name) or glob.glob(name) for name in names):
        return ""
    return "no shard matches"


# The directory


def check_place(root: Path, beside: tuple[str, ...]) -> None:
    """RUN is a run, empty, or absent below a directory that can be written."""
    try:
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is not a directory; --run names the directory to make")
        if root.is_dir():
            _check_contents(root, beside)
        existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    except OSError as error:
        raise UserError(f"{root}: cannot be read: {error.strerror}") from None
    if not existing.is_dir():
        raise UserError(f"{root}: {existing} is not a directory")
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise UserError(f"{root}: {existing} is on a read-only file system; choose another --run")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{root}: no permission to write in {existing}; change its permissions, or choose "
            "another --run"
        )


def _check_contents(root: Path, beside: tuple[str, ...]) -> None:
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    others = [name for name in names if name not in beside]
    if others and "config.toml" not in others:
        raise UserError(
            f"{root} holds {others[0]} and is not a run (no config.toml); "
            "choose an empty or a new directory"
        )


# What another config made


def _stale_stages(stages: Sequence[Stage]) -> list[Stage]:
    return [
        stage
        for stage in stages
        if stage.is_stale or (stage.done() is not None and not stage.is_done)
    ]


def _explain_stale(run: RunDirectory, stale: list[Stage]) -> str:
    names = [stage.place for stage in stale]
    listed = ", ".join(names[:8])
    if len(names) > 8:
        listed += f" and {len(names) - 8} more"
    return (
        f"{run.root} was made {_why_stale(run, stale)}\n"
        f"these stages would have to be redone (their KEY or DONE says so): {listed}\n"
        f"choose another --run, or redo just these with --force"
    )


def _why_stale(run: RunDirectory, stale: list[Stage]) -> str:
    """ "with another config: ...", "by an older version ..." or what else it can be."""
    changed = changed_keys(load_config(run.root / "config.toml"), run.config)
    if changed:
        lines = [f"  {key}: {_short(old)} -> {_short(new)}" for key, old, new in changed]
        return "\n".join(["with another config:", *lines])
    if any(stage.is_older for stage in stale):
        keys = unknown_to(run.root / "config.toml", run.config)
        reason = "by an older version of referral, whose results can still be read"
        return f"{reason}; it has no {', '.join(keys)}" if keys else reason
    return "with other data, other groups or another version of referral"


def changed_keys(old: Config, new: Config) -> list[tuple[str, object, object]]:
    """(dotted key, old value, new value) of each key that differs and that a stage depends on."""
    before, after = flat(old.dump()), flat(new.dump())
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    return [
        (key, before.get(key), after.get(key)) for key in keys if not key.startswith(OF_NO_STAGE)
    ]


def _short(value) -> str:
    if value is None:
        return "not set"
    text = json.dumps(value)
    if len(text) <= 60:
        return text
    return f"{text[:57]}..."


# environment.json


def save_environment(root: Path) -> None:
    """RUN/environment.json: where, with what and by which command the run was last started."""
    write_json(
        root / "environment.json",
        {
            "schema": 1,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "hostname": platform.node(),
            "cores": num_cores(),
            "packages": _versions(),
            "commit": _commit(),
            "directory": os.getcwd(),
            "argv": [redacted(word) for word in sys.argv],
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )


def _versions() -> dict[str, str]:
    versions = {"referral": VERSION}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The git commit of the working directory, with `+` if files differ from it."""
    try:
        head = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode != 0:
        return None
    mark = "+" if changes.stdout.strip() else ""
    return f"{head.stdout.strip()}{mark}"


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], capture_output=True, text=True, timeout=10)
