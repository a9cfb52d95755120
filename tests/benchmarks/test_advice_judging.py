"""How benchmarks.advice holds advice against levers that were pulled, in hand-worked numbers."""

import math
from collections.abc import Mapping

import numpy as np
import pytest

from benchmarks.advice import __main__ as program
from benchmarks.advice.judging import RULES, Held, Pulled, account, coverage, held, verdict
from pipeline.advice.extrapolation import LIKELY, Gain

N = 10


def pulled(right: int, training: float = 1.0, multiplications: float = 1.0) -> Pulled:
    """Right on the first so many of N examples. The generalist is on none."""
    correct = np.arange(N) < right
    error = 100 * float(correct.std()) / math.sqrt(N)
    taken = {"training": training, "multiplications": multiplications}
    return Pulled(10.0 * right, error, correct, taken)


def levers(**others: Pulled) -> Mapping[str, Pulled]:
    return {"stop": pulled(0, 0.0), **others}


FOUR = levers(average=pulled(4, multiplications=2.0), wider=pulled(8, 2.0, 2.0), train_on=pulled(3))


def test_the_best_lever_is_the_best_of_those_that_keep_to_the_limit():
    assert verdict("average", FOUR, "training").best == "average"
    assert verdict("average", FOUR, "multiplications").best == "train_on"


def test_regret_is_what_the_best_lever_gains_over_the_advised_one():
    judged = verdict("stop", FOUR, "training")
    assert (judged.gain, judged.best_gain, judged.regret) == (0.0, 40.0, 40.0)
    # Ten differences, four of them 1: variance .4 x .6.
    assert judged.error == pytest.approx(100 * math.sqrt(0.24 / 10))
    assert not judged.is_as_good


def test_a_lever_that_is_not_surely_worse_is_as_good():
    judged = verdict("train_on", FOUR, "training")
    assert judged.regret == pytest.approx(10.0)
    assert judged.error == pytest.approx(100 * math.sqrt(0.09 / 10))
    assert judged.regret < LIKELY * judged.error and judged.is_as_good


def test_a_rule_that_is_not_allowed_stops():
    regrets = verdict("average", FOUR, "training").by_rule
    assert regrets["wider"] == regrets["stop"] == pytest.approx(40.0)
    assert regrets["average"] == 0.0
    assert regrets["train_on"] == pytest.approx(10.0)


def test_a_rule_whose_lever_was_not_pulled_stops():
    assert verdict("stop", levers(), "training").by_rule == dict.fromkeys(RULES, 0.0)


def test_an_advised_lever_beyond_the_limit_in_truth_may_have_a_negative_regret():
    assert verdict("wider", FOUR, "training").regret == pytest.approx(-40.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (35.0, 45.0, Held(True, True)),
        (40.0, 40.0, Held(True, True)),
        (45.0, 50.0, Held(False, True)),  # the error of 4 right of 10 is 15.5 points
        (66.0, 70.0, Held(False, False)),
    ],
)
def test_an_interval_holds_a_gain_between_its_ends(low, high, expected):
    assert held(Gain((low + high) / 2, low, high), pulled(4)) == expected


def test_coverage_counts_intervals_and_averages_points():
    pairs = [(Gain(40.0, 30.0, 50.0), pulled(4)), (Gain(10.0, 0.0, 15.0), pulled(8))]
    found = coverage(pairs)
    assert (found.n, found.exactly, found.with_error) == (2, 0.5, 0.5)
    assert (found.width, found.predicted, found.measured) == (17.5, 25.0, 60.0)
    assert found.error == 35.0  # of 0 and 70


def test_an_account_counts_and_averages_verdicts():
    found = account([verdict(name, FOUR, "training") for name in ("average", "train_on", "stop")])
    assert (found.n, found.best, found.as_good) == (3, 1, 2)
    assert found.regret == pytest.approx(50 / 3) and found.worst == pytest.approx(40.0)
    assert found.by_rule["average"] == 0.0


def test_what_is_written_between_the_marks_leaves_the_rest_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{program.OPENS}\nold\n{program.CLOSES}\nafter\n")
    program.write_between(page, "new")
    assert page.read_text() == f"before\n{program.OPENS}\nnew\n{program.CLOSES}\nafter\n"


def test_the_page_has_the_marks():
    text = program.PAGE.read_text(encoding="utf-8")
    assert text.count(program.OPENS) == text.count(program.CLOSES) == 1
