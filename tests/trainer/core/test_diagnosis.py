"""What a generalist is short of, against numbers worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core.diagnosis import (
    FEWEST,
    STATES,
    Fall,
    Fit,
    Mean,
    among_likeliest,
    enough_errors,
    error_ratio,
    fall_of,
    fit_of,
    last_fifth,
    line,
    mean,
    paired,
    state_of,
    unpaired,
)

FALLS, FLAT = Fall("train", 0.5, 0.01), Fall("train", 0.01, 0.01)


def fit(errors: float, n: int = 10_000) -> Fit:
    return Fit(n, Mean(1 - errors, math.sqrt(errors * (1 - errors) / n)), Mean(errors, 0.01))


def cosine(step: int, steps: int, peak: float = 1.0) -> float:
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


def metrics(loss, steps=1000, every=20, rate=lambda step: 1.0):
    """Rows of a training whose loss is a function of the step."""
    return [
        {"step": step, "loss": loss(step), "lr": rate(step)}
        for step in range(every, steps + 1, every)
    ]


# Means and differences


def test_a_mean_and_its_standard_error_worked_by_hand():
    # Three right of four: p = 3/4, and sqrt(3/4 * 1/4 / 4) = sqrt(3) / 8.
    found = fit_of(np.array([True, True, False, True]), np.array([0.1, 0.3, 2.0, 0.4]))
    assert found.n == 4
    assert found.top1 == pytest.approx((0.75, math.sqrt(3) / 8))
    assert found.loss.value == pytest.approx(0.7)
    assert found.errors == 0.25


def test_two_samples_add_their_variances_and_one_sample_is_paired():
    assert unpaired(Mean(0.9, 0.03), Mean(0.7, 0.04)) == pytest.approx((0.2, 0.05))
    # Differences 0, 1, 0, -1: mean 0, and sqrt(1/2 / 4).
    before, after = np.array([1, 0, 1, 1]), np.array([1, 1, 1, 0])
    assert paired(after, before) == pytest.approx((0.0, math.sqrt(1 / 8)))


def test_the_ratio_of_errors_is_the_delta_methods():
    ratio = error_ratio(
        Fit(100, Mean(0.9, 0.02), Mean(0, 0)), Fit(100, Mean(0.8, 0.04), Mean(0, 0))
    )
    # (.02 / .2)^2 + (.5 * .04 / .2)^2 = .01 + .01
    assert ratio == pytest.approx((0.5, math.sqrt(0.02)))


def test_a_network_without_an_error_on_train_has_the_ratio_0():
    assert error_ratio(fit(0.0), fit(0.2)) == (0.0, 0.0)


# The rule


@pytest.mark.parametrize(
    "train, val, fall, state",
    [
        (0.19, 0.20, FLAT, "capacity"),
        (0.19, 0.20, None, "capacity"),
        (0.19, 0.20, FALLS, "steps"),
        (0.02, 0.20, FLAT, "data"),
        (0.02, 0.20, FALLS, "data"),  # by heart: the loss on train falls for ever
        (0.02, 0.20, Fall("val", 0.5, 0.01), "steps"),
        (0.13, 0.20, FLAT, "none"),  # between the two
        (0.30, 0.20, FLAT, "capacity"),  # of augmentation, say
    ],
)
def test_the_state_by_errors_on_train_and_val(train, val, fall, state):
    assert state_of(fit(train), fit(val), fall) == state


def test_a_generalist_that_never_saw_train_is_not_short_of_capacity_for_that():
    assert state_of(fit(0.2), fit(0.2), None, taught=False) == "none"
    assert state_of(fit(0.02), fit(0.2), None, taught=False) == "data"


def test_few_errors_tell_nothing():
    assert state_of(fit(0.0, 1000), fit((FEWEST - 1) / 1000, 1000), FLAT) == "none"
    assert state_of(fit(0.0, 1000), fit(FEWEST / 1000, 1000), FLAT) == "data"
    assert not enough_errors(fit((FEWEST - 1) / 1000, 1000))


def test_an_estimate_that_may_lie_on_the_other_side_is_no_state():
    # 10 and 20 errors of 200: the ratio is .5 +- .187, and .5 + 1.645 * .187 = .81 is alike.
    assert state_of(fit(0.0499, 200), fit(0.10, 200), FLAT) == "none"
    assert state_of(fit(0.0499, 2000), fit(0.10, 2000), FLAT) == "data"


@settings(deadline=None)
@given(
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.integers(1, 20_000),
    st.one_of(st.none(), st.just(FALLS), st.just(FLAT)),
)
def test_every_pair_of_fits_has_a_state(train, val, n, fall):
    assert state_of(fit(train, n), fit(val, n), fall) in STATES


def test_a_slope_within_its_error_does_not_count_as_falling():
    assert Fall("train", 0.2, 0.05).goes_on  # 1 - 2^-.2 = .13
    assert not Fall("train", 0.2, 0.15).goes_on
    assert not Fall("train", 0.1, 0.01).goes_on  # 1 - 2^-.1 = .067
    assert Fall("train", 1.0, 0.1).by_twice == 0.5


# Slopes


def test_a_line_worked_by_hand():
    # Of (0, 0), (1, 0), (2, 2) the slope is 1, and the residuals are 1/3, -2/3 and 1/3.
    assert line([0, 1, 2], [0, 0, 2]) == pytest.approx((1.0, math.sqrt(6 / 9 / 1 / 2)))


def test_the_fall_over_the_last_fifth_is_of_the_line_through_it():
    fell = last_fifth(metrics(lambda step: 3 - step / 1000))
    assert fell == pytest.approx((0.2, 0.0), abs=1e-9)
    assert last_fifth(metrics(lambda step: 1.0, steps=100, every=50)) is None
    assert last_fifth([]) is None


def test_a_power_of_the_steps_has_its_exponent_before_the_rate_goes_down():
    steps = 1000
    rows = metrics(
        # After half of the steps the rate lowers the loss by itself.
        lambda step: step**-0.3 * (1 if step <= 500 else 0.5),
        steps,
        rate=lambda step: cosine(step, steps),
    )
    fall = fall_of(rows)
    assert fall is not None
    assert (fall.split, fall.exponent) == ("train", pytest.approx(0.3))
    assert fall.by_twice == pytest.approx(1 - 2**-0.3)


def test_a_loss_that_falls_with_the_rate_alone_does_not_go_on():
    steps = 1000
    rows = metrics(
        lambda step: 1.0 if step <= 500 else 1.5 - step / 1000,
        steps,
        rate=lambda step: cosine(step, steps),
    )
    fall = fall_of(rows)
    assert fall is not None and not fall.goes_on
    assert last_fifth(rows).value == pytest.approx(0.2)


def test_validations_count_first_where_there_are_enough():
    rows = metrics(lambda step: step**-0.5)
    few = [{"step": step, "val/loss": 2.0} for step in (500, 1000)]
    assert fall_of([*rows, *few]).split == "train"
    enough = [{"step": step, "val/loss": 2.0} for step in (500, 750, 1000)]
    fall = fall_of([*rows, *enough])
    assert fall == ("val", pytest.approx(0.0), pytest.approx(0.0))


def test_nothing_is_known_of_a_training_without_rows():
    assert fall_of([]) is None
    assert fall_of(metrics(lambda step: 1.0, steps=50, every=50)) is None


# Where the true class is


def test_errors_are_counted_by_the_place_of_the_true_class():
    top = np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0], [1, 2, 0]])
    labels = np.zeros(4, int)  # right. Second. Third. Third
    assert among_likeliest(top, labels, [2, 3]) == {2: pytest.approx(1 / 3), 3: 1.0}


def test_without_an_error_there_is_no_fraction():
    assert among_likeliest(np.array([[0, 1]]), np.array([0]), [2]) == {2: None}


def test_a_mean_of_equal_numbers_has_no_error():
    assert mean(np.full(5, 2.0)) == (2.0, 0.0)
