"""A set of the user's own: whatever `referral init` reads, with the config that it proposes.

A directory per class, csv tables, npz, npy or idx files, tars, or a directory of shards.  The
generalist, its groups and specialists are those of the proposal for one core of a CPU, so that they
follow from the data alone.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from pipeline.config import UserError
from trainer.commands.init import shards_of_raw, values_of
from trainer.proposal.data_summary import DataSummary, find_shards, summarise
from trainer.proposal.settings import Hardware, propose, steps_of

from .sets import FP32, SETS, SPLITS, Set

ONE_CORE = Hardware(cores=1, memory=2**33, gpus=())
WHERE_IT_LIES = (*SPLITS, "workers")  # keys of [data] that are no part of a set
OF_COPIES = ("dustbin_rows",)  # keys that specialists of other kinds have not
BRANCH = {"embedding": 64}
RERANKED_FROM, RERANK = 500, {"k": 20, "random": 128}  # classes, and [rerank] of such sets


def name_and_path(words: str) -> tuple[str, Path]:
    """NAME=PATH of the command line."""
    name, equals, path = words.partition("=")
    if not (equals and path and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{words!r} is no NAME=PATH, such as fashion=data/fashion")
    if name in SETS:
        raise argparse.ArgumentTypeError(f"there is a set {name} already; call yours another name")
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{path}: no such file or directory")
    return name, Path(path)


def add_set(name: str, path: Path, to: Path) -> None:
    """Make its shards below TO/shards, unless they are there, and enter it among SETS."""
    out = to / "shards" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    make(path, out)
    shards = find_shards(str(out))
    assert shards is not None, out
    SETS[name] = set_of(summarise(shards), partial(make, path))


def make(path: Path, out: Path) -> None:
    """OUT holds the shards of PATH, or is a link to them."""
    if find_shards(str(out)):
        return
    if find_shards(str(path)):
        out.symlink_to(path.resolve(), target_is_directory=True)
        return
    shards_of_raw(str(path), out, force=False)


def set_of(data: DataSummary, make_shards: partial) -> Set:
    """What is trained of these data.  Raises UserError for data that make no groups."""
    if data.present < 4:
        raise UserError(f"{data.name}: {data.present} classes do not make two groups")
    values = values_of(propose(data, ONE_CORE))
    train = values["train"]
    epochs = train.pop("epochs")
    train["steps"] = steps_of(epochs, data.examples["train"], train["batch_size"])
    del train["validate_every"]  # networks are measured with the weights that they end with
    copies = values["specialists"]
    branches = {key: value for key, value in copies.items() if key not in OF_COPIES}
    return Set(
        make_shards,
        {
            "data": {key: v for key, v in values["data"].items() if key not in WHERE_IT_LIES},
            "model": values["model"],
            "train": train,
            "engine": FP32,
        },
        clusters=values["clusters"],
        copies=copies,
        branches=branches | {"model": BRANCH},
        rerank=RERANK if data.num_classes >= RERANKED_FROM else {},
        is_new=True,
    )
