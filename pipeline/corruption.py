"""The record of lost samples, as stages keep it in damage.json and results.json repeats it.

A stage's record is {split: {"samples": N, "where": {location: [reason, samples lost there]}}}.
N counts the samples of the split's manifest. A location is a shard and a place in it.
"""

from __future__ import annotations

from collections.abc import Iterable

EXAMPLES = 10  # corrupt samples that a report names


def merged(records: Iterable[dict[str, dict]]) -> dict[str, dict]:
    """Merge the records of several stages: a sample that many of them met is lost once."""
    splits: dict[str, dict] = {}
    for record in records:
        for name, recorded in record.items():
            split = splits.setdefault(name, {"samples": recorded["samples"], "where": {}})
            split["where"] |= recorded["where"]
    return splits


def count(split: dict) -> int:
    """How many samples of a split are lost."""
    return sum(samples for _, samples in split["where"].values())


def example(split: dict) -> str:
    """One lost sample of a split, with its reason."""
    location, (reason, _) = next(iter(split["where"].items()))
    return f"{location} {reason}"


def summary(splits: dict[str, dict]) -> dict[str, dict]:
    """{split: {samples, lost, share, examples}} of the splits that lost anything."""
    return {name: _split_summary(split) for name, split in splits.items() if split["where"]}


def _split_summary(split: dict) -> dict:
    lost = count(split)
    examples = list(split["where"].items())[:EXAMPLES]
    return {
        "samples": split["samples"],
        "lost": lost,
        "share": lost / split["samples"],
        "examples": [f"{location}: {reason}" for location, (reason, _) in examples],
    }
