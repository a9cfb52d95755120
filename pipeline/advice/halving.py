"""Successive halving of the pilots: how far each round trains them, and which go on.

Round 0 trains every family. Round 1 trains the better half of those that a longer pilot can tell
more about, for twice as long again. Jamieson & Talwalkar 2016. Shares are of the generalist's
steps, costs of its training compute.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

ROUNDS = 2
GROWTH = 2  # a round is so many times as long as the one before


def kept(families: int) -> int:
    """How many go on: the better half, rounded up."""
    return (families + 1) // 2


def round_shares(
    costs: Mapping[str, float], budget: float, further: Collection[str] | None = None
) -> tuple[float, ...]:
    """The share of the generalist's steps that each round trains a family for: f, 2 f.

    costs: of each family, what a share of the steps costs, in that share of its compute.
    budget: the most that all pilots may cost together, if the dearest go on.
    further: the families of which the better half goes on. None of all.
    """
    assert costs and budget > 0
    ascending = sorted(costs[name] for name in (costs if further is None else further))
    dearest = ascending[len(ascending) - kept(len(ascending)) :]
    first = budget / (sum(costs.values()) + GROWTH * sum(dearest))
    return first, GROWTH * first


def round_steps(
    costs: Mapping[str, float], budget: float, steps: int, further: Collection[str] | None = None
) -> tuple[int, ...]:
    """Optimizer steps of each round, whole numbers and at least one.

    steps: the generalist's.
    Where they are too few for the budget, one step each is more than the budget allows.
    """
    first = max(1, int(round_shares(costs, budget, further)[0] * steps))
    return first, GROWTH * first


def total_cost(costs: Mapping[str, float], going_on: Collection[str], lengths: tuple) -> float:
    """The cost of all pilots if these families go on. lengths: shares or steps of each round."""
    first, further = lengths
    return first * sum(costs.values()) + further * sum(costs[name] for name in going_on)


def better_half(highs: Mapping[str, float]) -> list[str]:
    """The families that go on, in their order: those that may still gain most.

    highs: the optimistic end of each family's predicted gain.  Of equal ones the first goes on.
    """
    ranked = sorted(highs, key=lambda name: -highs[name])  # sorted() is stable
    best = set(ranked[: kept(len(highs))])
    return [name for name in highs if name in best]
