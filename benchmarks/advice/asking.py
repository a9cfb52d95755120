"""What `referral advise` says of a set's generalist: the product's own stages, in this process.

Each lever is piloted by the settings by which benchmarks.advice.truth pulls it in full.  A run has
one [specialists] for copies and branches. Here the pilots of branches have the set's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.advice.graph import parse_pilot
from pipeline.config import ResolvedSpecialists, load_config, save_config
from pipeline.graph import RunDirectory
from pipeline.store import Stage, read_json, write_json
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import run_stage
from trainer.stages.pilots.groups import with_section

from .sets import SETS, shards_of
from .truth import Work, adopt

ADOPTED = ("generalist", "measure", "cluster", "route")
KEPT = ("advice.json", "diagnosis.json", "measured.json", "config.toml")


def advise(name: str, seed: int, budget: float, truth: Path, root: Path) -> Path:
    """The directory with the advice on a set and seed, which is given unless it is there.

    truth: where the generalist lies that is advised on, TO/SET/seed-S.  Of the run that gives the
    advice KEPT remains.
    """
    kept = kept_in(root, name, seed, budget)
    if (kept / "advice.json").exists():
        return kept
    unfinished = kept.with_name(f"{kept.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with session_of(name, seed, budget, truth, unfinished) as (session, branches):
        for stage in session.run.advice.stages:
            if not stage.is_done:
                run_stage(of_lever(session, stage, branches), stage)
        keep(session.run, kept)
    shutil.rmtree(unfinished)
    return kept


def kept_in(root: Path, name: str, seed: int, budget: float) -> Path:
    return root / f"{name}-{seed}-{round(100 * budget):03d}"


@contextmanager
def session_of(
    name: str, seed: int, budget: float, truth: Path, root: Path
) -> Iterator[tuple[Session, ResolvedSpecialists]]:
    """Of a run with the generalist and groups of the truth's, and [specialists] of its branches."""
    one = SETS[name]
    with process_group(load_config(None, [], {**one.config}).engine) as ranks:
        work = Work(name, seed, truth, shards_of(name, truth.parents[1]), one, ranks)
        values = work.config("copies")
        source = RunDirectory(truth / "copies", load_config(None, [], values))
        asked = values | {"advise": {"budget": budget}}
        if one.rerank:
            asked["rerank"] = work.config("rerank")["rerank"]
        run = RunDirectory(root, load_config(None, [], asked))
        root.mkdir(parents=True)
        save_config(run.config, root / "config.toml")
        (root / "cache").symlink_to((truth.parent / "cache").resolve(), target_is_directory=True)
        adopt(run, source, ADOPTED)
        branches = load_config(None, [], work.config("branches")).specialists
        yield Session(run.advice.run, ranks), branches


def of_lever(session: Session, stage: Stage, branches: ResolvedSpecialists) -> Session:
    """The session in which a stage is done."""
    if stage.name == "pilot" and parse_pilot(str(stage.address))[0] == "branches":
        return with_section(session, branches)
    return session


def keep(run: RunDirectory, kept: Path) -> None:
    """The records of an advice's stages. advice.json last, since it says that all is there."""
    for path in sorted(run.root.rglob("*.json")) + [run.root / "config.toml"]:
        place = path.relative_to(run.root)
        if path.name in KEPT and "attempts" not in place.parts and place.name != "advice.json":
            (kept / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept / place)
    write_json(kept / "advice.json", read_json(run.root / "advice.json"))
