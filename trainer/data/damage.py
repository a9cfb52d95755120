"""What is lost of each split, as stages keep it in damage.json and results.json tells it.  Nothing but dicts.

A stage's: {split: {"samples": of its manifest, "where": {place in a shard: [reason, samples lost there]}}}.
"""

EXAMPLES = 10  # damaged samples that a report names


def merged(losses: list[dict]) -> dict:
    """Several stages' as one: a sample that many of them met is lost once."""
    splits: dict[str, dict] = {}
    for each in losses:
        for name, facts in each.items():
            split = splits.setdefault(name, {"samples": facts["samples"], "where": {}})
            split["where"] |= facts["where"]
    return splits


def count(split: dict) -> int:
    return sum(samples for _, samples in split["where"].values())


def example(split: dict) -> str:
    place, (reason, _) = next(iter(split["where"].items()))
    return f"{place} {reason}"


def summary(splits: dict) -> dict:
    """results.json's: {split: {samples, lost, share, examples}} of the splits that lost anything."""
    return {
        name: {
            "samples": split["samples"],
            "lost": count(split),
            "share": count(split) / split["samples"],
            "examples": [
                f"{place}: {reason}"
                for place, (reason, _) in list(split["where"].items())[:EXAMPLES]
            ],
        }
        for name, split in splits.items()
        if split["where"]
    }
