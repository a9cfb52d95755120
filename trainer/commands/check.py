"""`python -m trainer check`: what only torch and a look into the shards can find wrong with a config, before RUN is
made.

The config comes as TOML on standard input.  Silence and exit code 0: nothing was found.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from importlib.util import find_spec

import torch

from pipeline.config import Config, UserError, load_config
from pipeline.graph import RunDirectory

from ..core.loop import check_batch_size
from ..data.augment import find_augment
from ..data.shards import open_shards
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
    """Raises UserError for shards that cannot be read or do not belong together, networks that cannot be built, batches
    that the ranks cannot share."""
    check_engine(config)
    check_batch_size(config.train.batch_size, processes, config.train.accumulation)
    for schedule in (config.specialists, *config.students.values()):
        check_batch_size(schedule.batch_size, 1, schedule.accumulation)
    find_augment(config.data.augment)
    check_shards(config)
    # Nothing is written: no cache, and a run directory that is not there.
    plain = config.model_copy(update={"data": config.data.model_copy(update={"cache": "none"})})
    session = Session(RunDirectory(os.devnull, plain), Ranks(0, 1, torch.device("cpu")))
    check_generalist(session)
    for student in config.students.values():
        find_augment(session.run.augment_of(student))
        left_out(session, student)
        fresh_network(session, student, members=student_members(config, student))
        if os.sep in student.teacher:
            from_elsewhere(student.teacher, session)


def check_generalist(session: Session) -> None:
    """It can be built, or what it starts from can be loaded and fits the data."""
    if session.config.extend.run:
        grown_generalist(session)
    elif given_generalist(session) is None:
        fresh_network(session)


def check_engine(config: Config) -> None:
    """What [engine] asks for is installed, and can be had together."""
    engine = config.engine
    precision(engine, choose_device(engine))
    if engine.name == "deepspeed" and find_spec("deepspeed") is None:
        raise UserError(
            "engine.name = \"deepspeed\" needs the package deepspeed: pip install 'referral[train]'"
        )
    for name in engine.track:
        if find_spec(name) is None:
            raise UserError(
                f"engine.track: {name} is not installed; pip install 'referral[{name}]'"
            )


def check_shards(config: Config) -> None:
    """Every split opens; val and test have the classes and the shape of train."""
    train = open_shards(config.data.train, config.data, "train")
    for split in ("val", "test"):
        shards = open_shards(getattr(config.data, split), config.data, split)
        if shards.class_names != train.class_names:
            raise UserError(
                f"data.{split} has other classes than data.train: they need one label set"
            )
        if shards.input_shape != train.input_shape:
            raise UserError(
                f"data.{split} has inputs of shape {list(shards.input_shape)}, data.train {list(train.input_shape)}"
            )
    for split in ("transfer", "ood"):
        if not getattr(config.data, split):
            continue
        data = config.data.model_copy(update={"label": "", "classes": None})
        shards = open_shards(getattr(config.data, split), data, split)
        if shards.input_shape != train.input_shape:
            raise UserError(
                f"data.{split} has inputs of shape {list(shards.input_shape)}, data.train {list(train.input_shape)}"
            )
