"""`python -m trainer check`: the mistakes in a config that only torch and the shards can show.

It runs before RUN is made. The config comes as TOML on standard input. Silence and exit code 0:
nothing was found.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from importlib.util import find_spec

import torch

from pipeline.config import Config, Schedule, UserError, load_config
from pipeline.graph import RunDirectory

from ..core.loop import check_batch_size
from ..data.augment import find_augment
from ..data.shards import ShardSet, open_shards
from ..distributed.ranks import Ranks, choose_device, precision
from ..session import Session
from ..stages.extending import grown_generalist
from ..stages.networks import fresh_network, given_generalist, student_members
from ..stages.student import left_out
from ..stages.teachers import from_elsewhere


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="trainer check", description=__doc__)
    parser.add_argument("--processes", type=int, default=1, help="ranks of the generalist")
    args = parser.parse_args(argv)
    check(load_config(None, [], tomllib.loads(sys.stdin.read())), args.processes)
    return 0


def check(config: Config, processes: int) -> None:
    """Raise UserError where a run of this config is bound to fail.

    Shards may be unreadable or not belong together, networks impossible to build, and batches
    impossible to share among the ranks.
    """
    check_engine(config)
    check_batches(config.train, processes)
    for schedule in (config.specialists, *config.students.values()):
        check_batches(schedule, 1)
    find_augment(config.data.augment)
    check_shards(config)
    check_networks(config)


def check_engine(config: Config) -> None:
    """What [engine] asks for is installed, and can be had together."""
    engine = config.engine
    precision(engine, choose_device(engine))
    package = engine.kind.package
    if package and find_spec(package) is None:
        raise UserError(
            f'engine.name = "{engine.name}" needs the package {package}: pip install {package}'
        )
    for name in engine.track:
        if find_spec(name) is None:
            raise UserError(
                f"engine.track: {name} is not installed; pip install 'referral[{name}]'"
            )


def check_batches(schedule: Schedule, processes: int) -> None:
    """A batch can be divided among the ranks and the accumulation steps."""
    batch_size, accumulation = schedule.batch_size, schedule.accumulation
    assert batch_size is not None and accumulation is not None, "load_config fills them in"
    check_batch_size(batch_size, processes, accumulation)


def check_shards(config: Config) -> None:
    """Every split opens; val and test have the classes and the shape of train."""
    train = open_shards(config.data.train, config.data, "train")
    for split in ("val", "test"):
        shards = open_shards(getattr(config.data, split), config.data, split)
        if shards.class_names != train.class_names:
            raise UserError(
                f"data.{split} has other classes than data.train: they need one label set"
            )
        check_shape(shards, train)
    unlabelled = config.data.model_copy(update={"label": "", "classes": None})
    for split in ("transfer", "ood"):
        pattern = getattr(config.data, split)
        if pattern:
            check_shape(open_shards(pattern, unlabelled, split), train)


def check_shape(shards: ShardSet, train: ShardSet) -> None:
    shape, expected = list(shards.input_shape), list(train.input_shape)
    if shape != expected:
        raise UserError(f"data.{shards.split} has inputs of shape {shape}, data.train {expected}")


def check_networks(config: Config) -> None:
    """The generalist and every student can be built, and teachers from elsewhere can be read."""
    # Nothing is written: no cache, and a run directory that is not there.
    data = config.data.model_copy(update={"cache": "none"})
    uncached = config.model_copy(update={"data": data})
    session = Session(RunDirectory(os.devnull, uncached), Ranks(0, 1, torch.device("cpu")))
    if config.extend.run:
        grown_generalist(session)
    elif given_generalist(session) is None:
        fresh_network(session)
    for student in config.students.values():
        find_augment(session.run.augment_of(student))
        left_out(session, student)
        fresh_network(session, student, members=student_members(config, student))
        if os.sep in student.teacher:
            from_elsewhere(student.teacher, session)
