"""Guards: the curve's gains are differences of its points, a sweep that still doubles its gain goes on, and one that is flat stops."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.config import StopSpec
from stockpot.outcomes import Accuracy, MarginalPoint
from stockpot.soup.marginal import curve, enough, expected_gain, sizes


def points(*correct: int) -> tuple[MarginalPoint, ...]:
    soups = [(2**power, Accuracy(correct=one, seen=1000)) for power, one in enumerate(correct)]
    return curve(soups, [1800.0] * 2 ** len(correct))


@given(trials=st.integers(1, 1000))
def test_the_curve_doubles_and_ends_with_all_trials(trials: int) -> None:
    found = sizes(trials)
    assert found[-1] == trials
    assert found[:-1] == [2**power for power in range(len(found) - 1)]
    assert len(found) < 2 or found[-2] < trials <= 2 * found[-2]


def test_gains_are_per_trial_and_per_accelerator_hour() -> None:
    first, second, third = points(800, 820, 840)
    assert (first.gain_per_trial, first.accelerator_hours) == (None, 0.5)
    assert second.gain_per_trial == pytest.approx(0.02)
    assert third.gain_per_trial == pytest.approx(0.01)
    assert third.gain_per_hour == pytest.approx(0.02)


def test_an_even_gain_a_doubling_is_expected_to_go_on() -> None:
    assert expected_gain(points(800, 820, 840, 860)) == pytest.approx(0.02 * math.log2(9 / 8))
    assert expected_gain(points(800, 850, 850, 850)) == 0.0
    assert expected_gain(points(800)) is None


@given(trials=st.integers(2, 300), start=st.floats(-1, 1), slope=st.floats(0, 0.1))
def test_what_grows_evenly_with_every_doubling_is_expected_to_go_on_whatever_the_last_step(trials: int, start: float, slope: float) -> None:
    """The last point is of all trials, which are no whole doubling."""
    even = [(count, Accuracy(correct=0, seen=1, other=start + slope * math.log2(count))) for count in sizes(trials)]
    found = expected_gain(curve(even, [1.0] * trials))
    assert found == pytest.approx(slope * (math.log2(trials + 1) - math.log2(trials)), abs=1e-12)
    falling = [(count, Accuracy(correct=0, seen=1, other=-one.value)) for count, one in even]
    assert expected_gain(curve(falling, [1.0] * trials)) == (pytest.approx(found, abs=1e-12) if slope == 0 else 0.0)


def test_a_point_costs_what_its_trials_took_in_the_order_they_were_drawn() -> None:
    soups = [(count, Accuracy(correct=correct, seen=10)) for count, correct in ((1, 5), (2, 6), (3, 9))]
    first, second, third = curve(soups, [3600.0, 7200.0, 10800.0])
    assert [point.accelerator_hours for point in (first, second, third)] == [1, 3, 6]
    assert (first.gain_per_hour, second.gain_per_hour, third.gain_per_hour) == (None, pytest.approx(0.05), pytest.approx(0.1))
    assert curve(soups[:2], [3600.0, 0.0])[1].gain_per_hour is None, "a trial that took no time has no gain an hour"


def test_a_flat_sweep_stops_and_a_rising_one_does_not() -> None:
    rule = StopSpec(below=0.001, after=4)
    flat = enough(points(800, 850, 851, 851), rule)
    assert flat is not None
    assert flat.reason == ("After 8 finished trials one more is expected to add 0.008 points on held_out; the request stops below 0.1.")
    assert enough(points(800, 820, 840, 860), rule) is None
    assert enough(points(800, 800), rule) is None, "too few finished to ask"
    assert enough(points(800), StopSpec(below=0.001, after=2)) is None
    rising = points(800, 820, 840, 860)
    expected = expected_gain(rising)
    assert expected
    assert enough(rising, StopSpec(below=expected, after=8)) is None, "what is asked for to the digit is not below it"
    assert enough(rising, StopSpec(below=1.001 * expected, after=8))
