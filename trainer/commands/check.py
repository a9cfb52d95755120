"""`python -P -m trainer check`: the mistakes in a config that only torch and the shards can show.

It runs before RUN is made. The config comes as TOML on standard input. Exit code 0: nothing was
found. What is odd but no mistake is a warning on standard error.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from clustering import ClassGroups
from pipeline.choices import FEWEST_TO_RERANK
from pipeline.config import Config, UserError, load_config
from pipeline.extras import require
from pipeline.graph import RunDirectory
from pipeline.redaction import shown
from pipeline.usage import Parser

from ..data.augment import find_augment
from ..data.shards import ShardSet, open_shards
from ..data.writing import describe
from ..distributed.ranks import Ranks, choose_device, precision
from ..engines.layers import check_layers
from ..session import Session
from ..stages.rehearsal import rehearse
from .needs import check_disk, check_memory

NAMED = 3  # classes in a warning


def main(argv: list[str]) -> int:
    parser = Parser(
        "python -P -m trainer check", "Check a config, which is read from standard input."
    )
    parser.add_argument("--processes", type=int, default=1, help="ranks of the generalist")
    parser.add_argument("--run", type=Path, default=None, help="where the run will be")
    parser.add_argument("--elsewhere", action="store_true", help="the run's machine is another")
    parser.add_argument("--no-networks", action="store_true", help="and has GPUs, as this has not")
    args = parser.parse_args(argv)
    config = load_config(None, [], tomllib.loads(sys.stdin.read()))
    warnings = check(config, args.processes, args.run, args.elsewhere, not args.no_networks)
    for warning in warnings:
        print(shown(f"warning: {warning}"), file=sys.stderr)
    return 0


def check(
    config: Config,
    processes: int,
    run: Path | None = None,
    elsewhere: bool = False,
    networks: bool = True,
) -> list[str]:
    """Warnings about a run of this config, one line each.

    processes: ranks of the generalist.  run: where it will be.  elsewhere: on a machine with
    another memory than this one's.  networks: try them, on the device that the run will have.
    Raises UserError, in one line, where the run is bound to fail: shards are unreadable or do not
    belong together, a network cannot be built or take its first step, a batch cannot be shared
    among the ranks, groups do not fit the classes, or the disk is too small.
    """
    check_engine(config)
    for augment in (config.data.augment, *(each.augment for each in config.students.values())):
        find_augment(augment or "none", options=config.data.augment_options)
    shards = check_shards(config)
    session = look_only(config, choose_device(config.engine))
    warnings = [
        *check_apart(shards),
        *check_batch(config, shards["train"]),
        *check_classes(session),
    ]
    if not networks:
        return warnings
    parts, notes = rehearse(session, processes)
    warnings += notes
    if not elsewhere:
        warnings += check_memory(config, parts, session.ranks.device)
    if run is not None:
        warnings += check_disk(config, parts, shards, run)
    return warnings


def look_only(config: Config, device: torch.device) -> Session:
    """A session that writes nothing: no cache, and a run directory that is not there."""
    data = config.data.model_copy(update={"cache": "none"})
    uncached = config.model_copy(update={"data": data})
    return Session(RunDirectory(os.devnull, uncached), Ranks(0, 1, device))


def check_engine(config: Config) -> None:
    """What [engine] asks for is installed, and can be had together."""
    engine = config.engine
    device = choose_device(engine)
    precision(engine, device)
    check_layers(engine, device)
    if engine.kind.package:
        require(engine.kind.package, f'engine.name = "{engine.name}"')
    for name in engine.track:
        require(name, f'engine.track = ["{name}"]')


def check_shards(config: Config) -> dict[str, ShardSet]:
    """Every split, opened. Val and test have the classes and the inputs of train."""
    train = open_shards(config.data.train, config.data, "train")
    opened = {"train": train}
    for split in ("val", "test"):
        shards = open_shards(getattr(config.data, split), config.data, split)
        if shards.class_names != train.class_names:
            raise UserError(
                f"data.{split} has other classes than data.train: they need one label set"
            )
        check_inputs(shards, train)
        opened[split] = shards
    unlabelled = config.data.model_copy(update={"label": "", "classes": None})
    for split in ("transfer", "ood"):
        pattern = getattr(config.data, split)
        if pattern:
            opened[split] = open_shards(pattern, unlabelled, split)
            check_inputs(opened[split], train)
    return opened


def check_inputs(shards: ShardSet, train: ShardSet) -> None:
    """Raises UserError where a split's inputs have another shape or type than train's."""
    shape, expected = list(shards.input_shape), list(train.input_shape)
    if shape != expected:
        raise UserError(f"data.{shards.split} has inputs of shape {shape}, data.train {expected}")
    if shards.input_dtype != train.input_dtype:
        raise UserError(
            f"data.{shards.split} has inputs of type {shards.input_dtype}, data.train "
            f"{train.input_dtype}: one network reads both alike"
        )
    ours, theirs = shards.pictures, train.pictures
    if ours and theirs and not ours.same_pixels(theirs):
        raise UserError(
            f"data.{shards.split} holds pictures made by other rules ({describe(ours)}) than "
            f"data.train ({describe(theirs)}); make both by one"
        )


def check_apart(shards: Mapping[str, ShardSet]) -> list[str]:
    """A line for each two of train, val and test that have shards in common.

    Inputs that lie in both are looked for where shards are made (`data.authoring.repeats`).
    """
    warnings = []
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        common = shards[one].contents & shards[other].contents
        if common:
            warnings.append(
                f"data.{one} and data.{other} have {len(common)} of {len(shards[other].contents)} "
                f"shards in common: figures on {other} come out too good"
            )
    return warnings


def check_batch(config: Config, train: ShardSet) -> list[str]:
    batch = config.train.batch_size
    if batch <= len(train):
        return []
    return [
        f"train.batch_size = {batch} is more than the {len(train)} examples of data.train: "
        "a step reads some of them several times"
    ]


def check_classes(session: Session) -> list[str]:
    """Classes that train has no example of, and groups against those that it has."""
    counts = session.shards("train").class_counts
    absent = np.flatnonzero(counts == 0)
    warnings = []
    if len(absent):
        names = ", ".join(session.class_names[c] for c in absent[:NAMED])
        if len(absent) > NAMED:
            names += f" and {len(absent) - NAMED} more"
        warnings.append(
            f"data.train has no example of {len(absent)} of {len(counts)} classes ({names}): "
            "nothing is learnt about them, and no specialist is theirs alone"
        )
    if session.run.method.has_groups and not session.config.extend.run:
        warnings += check_groups(session, counts > 0)
    if session.config.has_rerankers and len(counts) < FEWEST_TO_RERANK:
        warnings.append(
            f'ensemble.kind = "rerank" with {len(counts):,} classes: below about '
            f"{FEWEST_TO_RERANK:,} a re-ranker's step takes longer than a generalist's; "
            'kind = "shortlist" gives as much'
        )
    return warnings


def check_groups(session: Session, trained: np.ndarray) -> list[str]:
    """The groups that are asked for have classes with examples. Of the user's own, some have."""
    config = session.config.clusters
    if not config.groups_file:
        if config.num_groups > trained.sum():
            raise UserError(
                f"clusters.num_groups = {config.num_groups} is more than the {trained.sum()} "
                "classes that data.train has examples of; each group needs one of these"
            )
        return []
    try:
        groups = ClassGroups.load(config.groups_file)
    except (OSError, ValueError) as error:
        raise UserError(f"clusters.groups_file: {error}") from None
    if groups.num_classes != len(trained):
        raise UserError(
            f"clusters.groups_file = {config.groups_file} is for {groups.num_classes} classes, "
            f"the data has {len(trained)}"
        )
    untaught = [m for m, classes in enumerate(groups.members) if not trained[classes].any()]
    if len(untaught) == len(groups):
        raise UserError(
            f"clusters.groups_file = {config.groups_file}: data.train has no example of a class "
            "in any of its groups"
        )
    return [
        f"clusters.groups_file = {config.groups_file}: group {m} has no class with an example in "
        "data.train, and gets no specialist"
        for m in untaught
    ]
