"""Medians of pairs and their intervals, as benchmarks report them."""

import pytest

from benchmarks.statistics import median_interval, paired_ratio

pytestmark = pytest.mark.unit

OF_THREE_STARTS = [start + pair for start in (1.0, 1.1, 0.9) for pair in (-0.01, 0, 0.01, 0) * 4]


def test_the_ratio_is_that_of_pairs():
    ratio = paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0])
    assert ratio.median == 3.0
    assert (ratio.low, ratio.high) == (2.0, 4.0)


def test_starts_that_differ_widen_the_interval():
    alike, apart = (median_interval(OF_THREE_STARTS, starts) for starts in (1, 3))
    assert alike.median == apart.median
    assert apart.low < 0.95 < alike.low
    assert alike.high < 1.05 < apart.high


@pytest.mark.parametrize(
    ("values", "starts", "told"),
    [([1.0] * 4, 3, "4 values of 3 starts"), ([1.0] * 3, 2, "3 values of 2 starts")],
)
def test_starts_of_unequally_many_values_are_refused(values, starts, told):
    with pytest.raises(ValueError, match=told):
        median_interval(values, starts)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="1 numerators for 2 denominators"):
        paired_ratio([1.0], [1.0, 2.0])
