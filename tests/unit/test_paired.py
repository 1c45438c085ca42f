"""Comparisons of two ways to answer the same prompts."""

import numpy as np
import pytest
from scipy.stats import binomtest

from raee_serve.evaluation.paired import compare

pytestmark = pytest.mark.unit


def outcomes(both, ours, theirs, neither):
    """(ours, theirs) right: prompts that both, only one and neither answer correctly."""
    kinds = np.repeat(np.arange(4), [both, ours, theirs, neither])
    return (kinds == 0) | (kinds == 1), (kinds == 0) | (kinds == 2)


def test_the_same_answers_do_not_differ():
    own, other = outcomes(30, 0, 0, 12)
    found = compare([own], [other])
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(("wins", "losses"), [(20, 8), (8, 20), (5, 5), (3, 0)])
def test_one_task_is_mcnemars_exact_test(wins, losses):
    own, other = outcomes(50, wins, losses, 22)
    found = compare([own], [other])
    assert found.difference == pytest.approx((wins - losses) / (72 + wins + losses))
    assert found.low < found.difference < found.high
    assert found.p == pytest.approx(binomtest(wins, wins + losses).pvalue, abs=0.01)


def test_every_task_counts_alike():
    small, large = outcomes(0, 10, 0, 0), outcomes(500, 0, 0, 490)
    found = compare([small[0], large[0]], [small[1], large[1]])
    assert found.difference == pytest.approx(0.5)
    assert found.p < 0.01 and found.low == pytest.approx(0.5)  # nothing to vary in either task


def test_a_clear_difference_is_one_and_a_slight_one_is_not():
    clear = compare(*([part] for part in outcomes(500, 100, 40, 160)))
    assert clear.p < 1e-4 and clear.low > 0
    slight = compare(*([part] for part in outcomes(500, 45, 40, 215)))
    assert slight.p > 0.3 and slight.low < 0 < slight.high
