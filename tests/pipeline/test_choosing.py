"""Which lever is advised: by hand, and over any levers at all."""

import re

import pytest
from advised import GENERALIST, LEVERS, lever, made_up
from hypothesis import given
from hypothesis import strategies as st

from pipeline.advice.choosing import (
    STOP,
    allowed,
    amount,
    best_under,
    choose,
    limit_of,
    pareto,
    training_words,
    with_stop,
)
from pipeline.advice.levers import LEVERS as KINDS
from pipeline.advice.levers import SCARCITIES

# Any levers


def amounts(most):
    """Some that are equal, some unknown."""
    whole = st.integers(0, 4 * most).map(lambda quarter: quarter / 4)
    return whole | st.floats(0, most)


@st.composite
def some_levers(draw):
    names = draw(st.lists(st.sampled_from([*KINDS][1:]), unique=True))
    return [
        lever(
            name,
            gain=draw(st.integers(-20, 80).map(lambda tenth: tenth / 10) | st.floats(-2, 8)),
            half=draw(st.floats(0, 3)),
            training=draw(amounts(3)),
            multiplications=1 + draw(amounts(2)),
            parameters=1 + draw(amounts(2)),
            latency=1 + draw(amounts(2)),
            wall_clock=draw(amounts(3)),
        )
        for name in names
    ]


scarcities = st.sampled_from([*SCARCITIES])
limits = st.floats(0, 4)


def dominates(one, two, scarcity):
    """At least as good in gain, in what is scarce and in training, and better in one of them."""
    if STOP in (one["name"], two["name"]):
        return False
    figures = [
        (each["gain"], -(amount(each, scarcity, GENERALIST) or 0), -each["training"])
        for each in (one, two)
    ]
    return figures[0] != figures[1] and all(a >= b for a, b in zip(*figures, strict=True))


@given(some_levers(), scarcities, limits)
def test_no_allowed_lever_dominates_the_best_one(levers, scarcity, limit):
    best = best_under(levers, scarcity, limit, GENERALIST)
    others = [each for each in levers if allowed(each, scarcity, limit, GENERALIST)]
    assert not any(dominates(each, best, scarcity) for each in others)


@given(some_levers(), scarcities, limits, limits)
def test_a_higher_limit_never_lowers_the_best_gain(levers, scarcity, one, two):
    low, high = sorted((one, two))
    before = best_under(levers, scarcity, low, GENERALIST)
    after = best_under(levers, scarcity, high, GENERALIST)
    assert after["gain"] >= before["gain"]


@given(some_levers(), scarcities, limits)
def test_the_best_lever_is_allowed_gains_something_or_is_to_stop(levers, scarcity, limit):
    best = best_under(levers, scarcity, limit, GENERALIST)
    assert allowed(best, scarcity, limit, GENERALIST)
    assert best["gain"] > 0 or best["name"] == STOP


@given(some_levers(), scarcities, limits)
def test_the_best_lever_is_about_the_greatest_gain(levers, scarcity, limit):
    """Within .1 point or 5 % of the greatest, and never below three quarters of it."""
    best = best_under(levers, scarcity, limit, GENERALIST)
    gains = [each["gain"] for each in levers if allowed(each, scarcity, limit, GENERALIST)]
    most = max([0, *gains])
    assert best["gain"] >= most - max(0.1, 0.05 * most) - 1e-9
    assert best["gain"] >= 0.75 * most - 1e-9


@given(scarcities, st.floats(0, 10) | st.none())
def test_to_stop_is_always_allowed(scarcity, limit):
    (stop,) = with_stop([], GENERALIST)
    assert allowed(stop, scarcity, limit, GENERALIST)


@given(some_levers(), st.sampled_from([name for name in SCARCITIES if name != "trunk"]))
def test_a_front_holds_exactly_what_no_other_lever_beats(levers, scarcity):
    levers = with_stop(levers, GENERALIST)
    key = SCARCITIES[scarcity].quantity

    def is_beaten(each):
        return any(
            other["gain"] >= each["gain"]
            and other[key] <= each[key]
            and (other["gain"], other[key]) != (each["gain"], each[key])
            for other in levers
        )

    expected = {each["name"] for each in levers if not is_beaten(each)}
    assert set(pareto(levers, scarcity)) == expected


@given(some_levers(), st.sampled_from(["", *SCARCITIES]))
def test_the_choice_is_the_best_under_its_scarcity_and_its_sentence_says_so(levers, scarce):
    choice = choose(levers, GENERALIST, scarce, None)
    under = choice["best_for"][scarce or "training"]
    assert under["lever"] == choice["best"]
    what = "stop here" if choice["best"] == STOP else KINDS[choice["best"]].what
    assert choice["sentence"].lower().startswith(what.split(" likeliest")[0])
    assert choice["sentence"].endswith(".")


# By hand


def name_of_best(levers, scarcity, limit=None):
    return best_under(levers, scarcity, limit_of(scarcity, limit), GENERALIST)["name"]


@pytest.mark.parametrize(
    "scarcity, limit, best",
    [
        ("training", None, "shortlist"),
        ("training", 0.7, "branches"),  # of what takes no more than .7: +1.5
        ("training", 0.5, "stop"),
        ("wall_clock", 0.2, "branches"),  # copies, +1.2, take as little
        ("multiplications", None, "shortlist"),  # × 1.004
        ("multiplications", 1.0, "average_student"),
        ("latency", 1.05, "average_student"),
        ("parameters", None, "average_student"),
        ("parameters", 2.0, "shortlist"),
        ("trunk", None, "branches"),
    ],
)
def test_the_best_lever_by_hand(scarcity, limit, best):
    assert name_of_best(LEVERS, scarcity, limit) == best


def test_of_gains_within_a_tenth_of_a_point_the_cheaper_lever_wins():
    dear = lever("wider", 1.0, 0.5, 2.0, 2.0, 2.0, 2.0)
    cheap = lever("train_on", 0.95, 0.5, 1.0, 1.0, 1.0, 1.0)
    assert name_of_best([dear, cheap], "training", 3) == "train_on"
    cheap["gain"] = 0.85
    assert name_of_best([dear, cheap], "training", 3) == "wider"


def test_of_great_gains_one_twentieth_is_no_reason_to_pay():
    dear = lever("wider", 20.0, 0.5, 2.0, 2.0, 2.0, 2.0)
    cheap = lever("train_on", 19.1, 0.5, 1.0, 1.0, 1.0, 1.0)
    assert name_of_best([dear, cheap], "training", 3) == "train_on"


def test_of_small_gains_a_free_nothing_is_not_as_good():
    """0.08 points may be a tenth of all errors."""
    small = lever("train_on", 0.08, 0.02, 1.0, 1.0, 1.0, 1.0)
    nothing = lever("branches", 0.01, 0.02, 0.5, 1.0, 1.0, 1.0)
    assert name_of_best([small, nothing], "training") == "train_on"


def test_what_takes_equally_much_of_what_is_scarce_is_told_apart_by_training():
    one = lever("average", 3.0, 0.5, 1.0, 2.0, 2.0, 2.0)
    two = lever("wider", 3.0, 0.5, 0.5, 2.0, 2.0, 2.0)
    assert name_of_best([one, two], "multiplications", 2.5) == "wider"


def test_where_nothing_is_expected_to_gain_the_advice_is_to_stop():
    worse = lever("train_on", 0.0, 0.4, 0.0, 1.0, 1.0, 1.0)
    choice = choose([worse], GENERALIST, "", None)
    assert choice["best"] == "stop"
    assert choice["sentence"] == (
        "Stop here: train_on, the best of the rest, is expected to gain 0.0 points (-0.4 to 0.4)."
    )


def test_a_lever_whose_latency_nobody_knows_is_not_taken_where_latency_is_scarce():
    unknown = lever("shortlist", 4.8, 0.8, 1.0, 1.0, 2.0, 1.0) | {"latency_ms": None}
    assert name_of_best([unknown], "latency") == "stop"
    assert name_of_best([unknown], "multiplications") == "shortlist"
    assert pareto([unknown], "latency") == []


@pytest.mark.parametrize("name", [name for name in KINDS])
def test_only_branches_leave_the_trunk_as_it_is(name):
    each = lever(name, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0)
    assert allowed(each, "trunk", None, GENERALIST) == (name in ("stop", "branches"))


def test_the_sentence_has_the_gain_its_interval_the_price_and_who_may_be_as_good():
    choice = choose(LEVERS, GENERALIST, "", None)
    assert choice["sentence"] == (
        "Train a second generalist and ask it about the first one's 100 likeliest classes: "
        "+4.8 points (4.0 to 5.6) for as much training again; "
        "average (+3.5, 2.8 to 4.2) may be as good."
    )
    assert choice["elsewhere"] == (
        "Best where something else is scarce: average_student (+2.1) for parameters; "
        "branches (+1.5) for an untouched trunk."
    )


def test_a_sentence_under_a_scarcity_says_how_much_of_it_is_taken():
    choice = choose(LEVERS, GENERALIST, "multiplications", 1.2)
    assert choice["limit"] == 1.2
    assert (
        "for as much training again, at 1.00 × the generalist's multiplications"
        in (choice["sentence"])
    )
    assert "average (" not in choice["sentence"]  # not allowed: × 2


def test_a_lever_that_pilots_were_too_short_for_is_named_with_what_it_may_gain():
    best = lever("shortlist", 4.0, 2.0, 1.0, 1.0, 2.0, 1.0)
    open_still = lever("branches", 2.0, 7.0, 0.6, 1.05, 1.2, 1.3)
    sentence = choose([best, open_still], GENERALIST, "", None)["sentence"]
    assert sentence.endswith(
        "These pilots are too short to tell: branches may gain up to +9.0 points; a larger "
        "--budget says more."
    )
    told = lever("branches", 2.0, 3.9, 0.6, 1.05, 1.2, 1.3)  # at most as much as the best
    assert "too short" not in choose([best, told], GENERALIST, "", None)["sentence"]
    # Of training on a longer pilot would say no more.
    other = lever("train_on", 2.0, 7.0, 0.6, 1.05, 1.2, 1.3)
    assert "too short" not in choose([best, other], GENERALIST, "", None)["sentence"]


def test_one_that_is_told_apart_is_not_said_to_be_as_good():
    far = lever("average", 1.0, 0.5, 1.0, 2.0, 2.0, 2.0)
    near = lever("shortlist", 4.8, 0.8, 1.0, 1.0, 2.0, 1.0)
    assert "as good" not in choose([far, near], GENERALIST, "", None)["sentence"]


@pytest.mark.parametrize("scarce", ["", *SCARCITIES])
def test_a_sentence_has_few_words_before_it_says_who_may_be_as_good(scarce):
    sentence = made_up(scarce)["sentence"].split(";")[0]
    assert len(re.findall(r"[\w'.+-]+", sentence)) <= 32


@pytest.mark.parametrize(
    "training, words",
    [
        (1.0, "as much training again"),
        (1.04, "as much training again"),
        (0.5, "half as much training again"),
        (0.3, "30 % of the generalist's training"),
        (2.5, "2.5 times the generalist's training"),
        (12.4, "12 times the generalist's training"),
    ],
)
def test_a_share_of_training_in_words(training, words):
    assert training_words(training) == words
