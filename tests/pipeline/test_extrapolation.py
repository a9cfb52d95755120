"""What small pilots forecast: by hand-worked numbers, and what must hold of any."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.advice.extrapolation import (
    HEALED,
    LATE,
    LEAST_HEALED,
    LIKELY,
    MOST_HEALED,
    OF_DIVERSITY,
    OF_MIXED,
    OF_TEACHERS,
    QUIET_FALL,
    RULES,
    SLOPE_KEPT,
    STUDENT,
    TRAIN_ON,
    USUAL_FALL,
    Evidence,
    LogRatio,
    correlation_in_full,
    gain_of,
    gains,
    measured_gain,
    specialists,
)
from pipeline.advice.levers import LEVERS

NOTHING = {"gain": 0.0, "gain_se": 0.001}


def second(correlation, short=0.5, own=0.25, **forms):
    """The record of a second generalist's pilot. Short, own: Brier scores."""
    measured = {"generalist": {"brier": own}, "alone": {"brier": short}}
    measured |= dict.fromkeys(("average", "geometric", "shortlist"), NOTHING)
    return {"residual_correlation": correlation, "forms": measured | forms, "share": 0.05}


def groups(healed, share=1.0, se=0.01, ceiling=0.1, every=0.2, which=(0,)):
    """The record of specialists' pilot."""
    return {
        "groups": list(which),
        "healed": healed,
        "healed_se": se,
        "ceiling": ceiling,
        "ceiling_all": every,
        "full_share": share,
        "forms": {"branches": NOTHING},
    }


def test_every_lever_has_a_rule():
    assert RULES.keys() == LEVERS.keys()


def test_stopping_gains_nothing():
    assert gains(Evidence(0.3, 0.5))["stop"] == (0, 0, 0)


def test_a_log_ratio_is_points_of_top1():
    # Half of 40 % errors: 20 points.  One sd of .1: errors times e^(+-.1645) / 2.
    gain = gain_of(LogRatio(math.log(0.5), 0.1), 0.4)
    assert gain.gain == pytest.approx(20)
    assert gain.low == pytest.approx(100 * (0.4 - 0.2 * math.exp(0.1645)))
    assert gain.high == pytest.approx(100 * (0.4 - 0.2 * math.exp(-0.1645)))


def test_a_spread_multiplies_what_is_expected():
    gain = gain_of(LogRatio(-0.1, 0.0, math.log(2) / LIKELY), 0.4)
    assert gain.low == pytest.approx(40 * (1 - math.exp(-0.05)))
    assert gain.high == pytest.approx(40 * (1 - math.exp(-0.2)))


def test_what_a_pilot_measured_has_the_interval_of_its_error():
    record = {"forms": {"on": {"gain": 0.01, "gain_se": 0.002}}}
    assert measured_gain(record, "on") == pytest.approx((1.0, 1 - 0.329, 1 + 0.329))


# A second generalist


def test_the_correlation_goes_on_in_the_log_of_brier_scores():
    # log 4 -> log 2 of the ratio, .5 -> .6 of the correlation. Log 2 is left to go.
    rounds = [second(0.5, short=0.8, own=0.2), second(0.6, short=0.4, own=0.2)]
    slope = SLOPE_KEPT * 0.1 / math.log(2)
    assert correlation_in_full(rounds) == pytest.approx(0.6 + slope * math.log(2))


def test_two_equal_networks_need_no_extrapolation():
    assert correlation_in_full([second(0.7, short=0.25, own=0.25)]) == 0.7


def test_what_averaging_gains_is_what_the_two_do_not_share():
    record = second(0.7, short=0.25, own=0.25)
    gain = gains(Evidence(0.3, 0.0, {"second": [record]}))["average"].gain
    assert gain == pytest.approx(30 * (1 - math.exp(-OF_DIVERSITY["average"] * 0.3)))


def test_of_networks_that_learn_late_each_unit_gains_more_and_the_correlation_stays():
    records = [second(0.4, short=1.0), second(0.5, short=0.99)]
    assert correlation_in_full(records) == 0.5
    gain = gains(Evidence(0.3, 0.0, {"second": records}))["shortlist"].gain
    assert gain == pytest.approx(30 * (1 - math.exp(-LATE["shortlist"] * 0.5)))


def test_half_begun_is_half_of_each():
    record = second(0.5, short=0.93, own=0.93)  # half way from .98 to .88. Equals
    per_unit = (OF_DIVERSITY["average"] + LATE["average"]) / 2
    gain = gains(Evidence(0.3, 0.0, {"second": [record]}))["average"].gain
    assert gain == pytest.approx(30 * (1 - math.exp(-per_unit * 0.5)))


@pytest.mark.parametrize("fit", [0.0, 0.6, 1.0])
def test_a_student_learns_the_less_of_its_teachers_the_less_the_generalist_knows(fit):
    records = {"second": [second(0.7, short=0.25, own=0.25)]}
    teachers = OF_DIVERSITY["average"] * 0.3
    student = gains(Evidence(0.3, fit, records))["average_student"].gain
    expected = STUDENT + OF_TEACHERS * (1 - fit) * teachers
    assert student == pytest.approx(30 * (1 - math.exp(-expected)))


def test_a_student_of_mixed_bags_learns_what_its_teachers_gain():
    records = {"second": [second(0.7, short=0.25, own=0.25)]}
    expected = gains(Evidence(0.3, 0.5, records, has_bags=True))
    teachers = math.log(1 - expected["average"].gain / 30)
    student = math.log(1 - expected["average_student"].gain / 30)
    assert student == pytest.approx(OF_MIXED * teachers)


def test_a_pilot_that_is_surely_better_already_is_believed():
    better = {"gain": 0.1, "gain_se": 0.001}  # of 30 % errors
    record = second(0.97, short=0.25, own=0.25, average=better)
    gain = gains(Evidence(0.3, 0.0, {"second": [record]}))["average"]
    assert gain.gain == pytest.approx(10)


def test_without_a_pilot_nothing_is_said_of_what_needs_one():
    assert gains(Evidence(0.3, 0.5)).keys() == {"stop", "train_on", "wider"}


# The generalist itself


def test_training_on_gains_little_where_train_is_known_by_heart():
    known, alike = (gains(Evidence(0.3, fit))["train_on"].gain for fit in (0.0, 1.0))
    assert known == pytest.approx(30 * (1 - math.exp(-TRAIN_ON[0])))
    assert alike == pytest.approx(30 * (1 - math.exp(-sum(TRAIN_ON))))


def test_training_on_gains_more_where_the_loss_still_fell_fast():
    def shrunk(fall):
        return -math.log(1 - gains(Evidence(0.3, 1.0, fall=fall))["train_on"].gain / 30)

    assert shrunk(None) == shrunk(0.1) == pytest.approx(sum(TRAIN_ON))
    assert shrunk(2 * USUAL_FALL) == pytest.approx(TRAIN_ON[0] + 2 * TRAIN_ON[1])
    # And less where it hardly falls any more: labels that are wrong are never learnt.
    assert shrunk(QUIET_FALL / 2) == pytest.approx(TRAIN_ON[0] + TRAIN_ON[1] / 2)
    assert shrunk(0.0) == shrunk(-0.1) == pytest.approx(TRAIN_ON[0])


def test_what_branches_heal_width_can():
    blind = gains(Evidence(0.3, 0.5))["wider"].gain
    seen = gains(Evidence(0.3, 0.5, {"branches": [groups(0.8, every=0.28)]}))["wider"].gain
    assert seen > 2 * blind


# Specialists


def test_a_pilot_in_full_stands_for_all_groups():
    # They heal .5 of the .2 that perfect ones would, of .4 errors: a quarter.
    ratio = specialists("branches")(Evidence(0.4, 0.0, {"branches": [groups(0.5)]}))
    assert ratio is not None and ratio.mean == pytest.approx(math.log(0.75))


def test_first_steps_that_heal_nothing_leave_it_open():
    started = groups(0.0, share=0.1, se=0.02)
    short, full = (
        specialists("branches")(Evidence(0.4, 1.0, {"branches": [record]}))
        for record in (started, groups(0.0, se=0.02))
    )
    assert short is not None and full is not None
    # Of 1 - .1^2 as much as specialists usually heal, of half of all errors.
    assert short.mean == pytest.approx(math.log(1 - 0.99 * HEALED / 2))
    assert full.mean == 0
    # They may heal all of what perfect ones would. Those that were piloted whole may not.
    assert gain_of(short, 0.4).high == pytest.approx(40 * MOST_HEALED / 2)
    assert gain_of(full, 0.4).high < 5
    # At worst they lose a little, whatever is not known.
    for ratio in (short, full):
        assert gain_of(ratio, 0.4).low >= 40 * LEAST_HEALED / 2 - 1e-9


def test_several_groups_count_by_their_ceilings():
    rounds = [groups(0.6, ceiling=0.03, which=(1,)), groups(0.2, ceiling=0.01, which=(2,))]
    ratio = specialists("copies")(Evidence(0.4, 0.0, {"copies": rounds}))
    assert ratio is not None and ratio.mean == pytest.approx(math.log(1 - 0.5 * 0.5))


def test_of_one_group_the_last_round_counts():
    rounds = [groups(0.1, share=0.3), groups(0.4)]
    again = specialists("copies")(Evidence(0.4, 0.0, {"copies": rounds}))
    assert again == specialists("copies")(Evidence(0.4, 0.0, {"copies": rounds[1:]}))


# Of any evidence


@st.composite
def evidences(draw):
    fraction = st.floats(0, 1)
    rounds = st.lists(
        st.builds(second, st.floats(-1, 1), st.floats(0.01, 1.2), st.floats(0.01, 1.2)), max_size=2
    )
    piloted = st.lists(
        st.builds(groups, st.floats(-1, 1), fraction, st.floats(0, 0.3), fraction, fraction),
        max_size=2,
    )
    records = {"second": draw(rounds), "copies": draw(piloted), "branches": draw(piloted)}
    measured = {name: each for name, each in records.items() if each}
    return Evidence(draw(st.floats(0, 1)), draw(fraction), measured)


@given(evidences())
def test_an_interval_holds_what_is_expected_and_no_more_than_all_errors(evidence):
    for name, gain in gains(evidence).items():
        assert all(map(math.isfinite, gain)), name
        assert gain.low <= gain.gain + 1e-9 and gain.gain <= gain.high + 1e-9, name
        assert gain.high <= 100 * evidence.error + 1e-9, name


@given(st.floats(0, 1), st.floats(0, 0.9), st.floats(0, 0.9))
def test_the_less_errors_go_together_the_more_averaging_gains(fit, one, other):
    low, high = sorted((one, other))
    alike, apart = (
        gains(Evidence(0.3, fit, {"second": [second(c, short=0.25, own=0.25)]}))["average"].gain
        for c in (high, low)
    )
    assert apart >= alike - 1e-12
