"""What a campaign of faults is asked for: how many trials, from which one on, by which seed.

    PROGRAM 500 --first 5000
        makes trials 5,000 to 5,499

What a trial does depends on its number and the seed alone, so that pieces make up the whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

SEEDS_APART = 1_000_000  # of trials whose number is all that they are made from


class Asked(NamedTuple):
    """trials: their numbers.  words: what else is asked for."""

    trials: range
    seed: int
    words: list[str]

    @property
    def numbers(self) -> range:
        """The trials' numbers, other ones for every seed."""
        shift = SEEDS_APART * self.seed
        return range(shift + self.trials.start, shift + self.trials.stop)

    def __str__(self) -> str:
        """What stands in the line that sums up."""
        return f"from {self.trials.start} to {self.trials.stop - 1}, seed {self.seed}"


def asked(count: int, words: str = "", argv: Sequence[str] | None = None) -> Asked:
    """What the command line asks for. `count` trials where it says nothing.

    words: what further arguments are called, where there may be any.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int, nargs="?", default=count)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    if words:
        parser.add_argument("words", metavar=words, nargs="*", default=[])
    given = parser.parse_args(argv)
    trials = range(given.first, given.first + given.count)
    return Asked(trials, given.seed, getattr(given, "words", []))
