"""What data and machines may be, as `referral init` sees them."""

import dataclasses

from trainer.proposal.data_summary import DataSummary
from trainer.proposal.settings import Hardware

GIB = 2**30
LAPTOP = Hardware(cores=2, memory=8 * GIB)
SERVER = Hardware(cores=32, memory=80 * GIB, gpus=("GPU",) * 3)

GRAY = DataSummary(
    name="shards",
    patterns={"train": "shards", "val": "shards", "test": "shards"},
    examples={"train": 8_000, "val": 1_000, "test": 1_000},
    num_classes=100,
    smallest=80,
    largest=80,
    present=100,
    kind="pictures",
    extensions=("png",),
    shape=(1, 28, 28),
    dtype="uint8",
    mean=(0.13,),
    std=(0.31,),
    sampled=2_000,
    gray=True,
    drawn=True,
)


def with_classes(count: int, each: int, **changes) -> DataSummary:
    sizes = {"train": count * each, "val": max(1, count * each // 8), "test": count}
    changes = {"smallest": each, "largest": each, "present": count, **changes}
    return dataclasses.replace(GRAY, num_classes=count, examples=sizes, **changes)
