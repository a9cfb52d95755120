"""How far each round of pilots trains, by hand-worked numbers and for any families."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.advice.halving import better_half, kept, round_shares, round_steps, total_cost

COSTS = {"on": 1.0, "wide": 2.0, "second": 1.0, "copies": 1.0, "branches": 0.5}
some_costs = st.dictionaries(st.text("abcdef", min_size=1), st.floats(0.1, 8.0), min_size=1)
budgets = st.floats(0.01, 2.0)


def test_shares_of_five_families():
    # All five cost 5.5, the dearest three 4: f (5.5 + 2 x 4) = .27, so f = .02.
    assert round_shares(COSTS, 0.27) == pytest.approx((0.02, 0.04))
    # One family goes on with itself: f (1 + 2) = .3.
    assert round_shares({"on": 1.0}, 0.3) == pytest.approx((0.1, 0.2))
    # Of two, one goes on: f (1 + .5 + 2 x 1) = .35.
    assert round_shares({"on": 1.0, "rerank": 0.5}, 0.35) == pytest.approx((0.1, 0.2))
    # Of the five, wide ends after the first round, and two of the others go on: f (5.5 + 2 x 2).
    others = COSTS.keys() - {"wide"}
    assert round_shares(COSTS, 0.285, others) == pytest.approx((0.03, 0.06))
    assert round_shares({"wide": 2.0}, 0.3, []) == pytest.approx((0.15, 0.3))


def test_steps_are_whole_rounded_down_and_at_least_one():
    assert round_steps(COSTS, 0.27, 1049) == (20, 40)  # .02 x 1,049 = 20.98
    assert round_steps(COSTS, 0.27, 30) == (1, 2)  # .6 of a step


def test_the_better_half_is_rounded_up_and_keeps_the_order_of_the_families():
    assert [kept(n) for n in range(1, 7)] == [1, 1, 2, 2, 3, 3]
    highs = {"on": 0.5, "wide": 2.0, "second": -0.1, "copies": 0.7, "branches": 0.6}
    assert better_half(highs) == ["wide", "copies", "branches"]
    assert better_half({"on": 0.0, "wide": 0.0, "second": 0.0}) == ["on", "wide"]


@given(some_costs, budgets, st.data())
def test_no_choice_of_families_costs_more_than_the_budget(costs, budget, data):
    highs = {name: data.draw(st.floats(-1, 1)) for name in costs}
    further = data.draw(st.sets(st.sampled_from(sorted(costs))))
    lengths = round_shares(costs, budget, further)
    going_on = better_half({name: highs[name] for name in highs if name in further})
    assert total_cost(costs, going_on, lengths) <= budget * (1 + 1e-9)


@given(some_costs, budgets)
def test_the_dearest_half_costs_the_whole_budget(costs, budget):
    dearest = better_half(costs)
    assert total_cost(costs, dearest, round_shares(costs, budget)) == pytest.approx(budget)


@given(some_costs, budgets, st.integers(1, 10**6))
def test_whole_steps_cost_no_more_either_but_where_one_step_does(costs, budget, steps):
    lengths = round_steps(costs, budget, steps)
    spent = total_cost(costs, better_half(costs), lengths) / steps
    assert lengths == (1, 2) or spent <= budget * (1 + 1e-9)
