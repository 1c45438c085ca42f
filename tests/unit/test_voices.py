"""Voices are heard as loudly as they help, and probabilities are calibrated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raee_serve.exits import voices
from raee_serve.exits.voices import FIT_ROWS, fitted_weights, log_likelihood, mixed, softmax

pytestmark = pytest.mark.unit

N, LABELS = 3000, 4


@pytest.fixture(scope="module")
def telling():
    """(scores, golds) where twice the scores are log-probabilities."""
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(N, LABELS))
    golds = [draw.choice(LABELS, p=own) for own in softmax(2 * scores)]
    return scores, np.array(golds, np.int32)


def noise(seed=1):
    return np.random.default_rng(seed).normal(size=(N, LABELS))


def test_one_voice_is_given_its_temperature(telling):
    scores, golds = telling
    (weight,) = fitted_weights([scores], golds)
    assert weight == pytest.approx(2, rel=0.1)
    (louder,) = fitted_weights([10 * scores], golds)
    assert louder == pytest.approx(weight / 10, rel=1e-3)
    by_grid = max(np.linspace(0.2, 5, 481), key=lambda own: log_likelihood(own * scores, golds))
    assert weight == pytest.approx(by_grid, abs=0.03)


def test_probabilities_are_as_sure_as_they_are_right(telling):
    scores, golds = telling
    said = softmax(fitted_weights([scores / 50], golds)[0] * scores / 50)
    right = (said.argmax(axis=1) == golds).mean()
    assert said.max(axis=1).mean() == pytest.approx(right, abs=0.02)


def test_a_voice_that_misleads_is_left_out(telling):
    scores, golds = telling
    weights = fitted_weights([scores, -0.5 * scores + noise()], golds)
    assert weights[0] > 1 and weights[1] == 0


def test_a_voice_that_says_nothing_is_hardly_heard(telling):
    scores, golds = telling
    useful, useless = fitted_weights([scores, noise()], golds)
    assert useful == pytest.approx(fitted_weights([scores], golds)[0], rel=0.02)
    assert useless < 0.05 * useful


def test_a_second_witness_helps(telling):
    scores, golds = telling
    one, other = scores + noise(2), scores + noise(3)
    both = mixed([one, other], fitted_weights([one, other], golds))
    alone = [log_likelihood(fitted_weights([v], golds)[0] * v, golds) for v in (one, other)]
    assert log_likelihood(both, golds) > max(alone) + 0.05


def test_few_rows_are_heard_with_caution():
    right = np.array([[1.0, 0.0], [0.0, 1.0]])
    (weight,) = fitted_weights([right], np.array([0, 1], np.int32))
    assert 0 < weight < 10  # unbounded without the pull towards 0


def test_a_voice_of_equal_scores_does_no_harm(telling):
    scores, golds = telling
    weights = fitted_weights([scores, np.full((N, LABELS), 3.0)], golds)
    said = softmax(mixed([scores, np.full((N, LABELS), 3.0)], weights))
    assert np.isfinite(said).all() and weights[0] == pytest.approx(2, rel=0.1)


def test_of_many_rows_a_sample_is_fitted_to(telling, monkeypatch):
    scores, golds = telling
    assert N < FIT_ROWS
    monkeypatch.setattr(voices, "FIT_ROWS", 100)
    chosen = np.random.default_rng(0).permutation(N)[:100]
    (sampled,) = fitted_weights([scores], golds)
    (expected,) = fitted_weights([scores[chosen]], golds[chosen])
    assert sampled == pytest.approx(expected, rel=1e-4)


def test_likelihood_is_the_mean_over_rows():
    scores = np.log([[0.25, 0.75], [0.9, 0.1]])
    expected = np.log([0.75, 0.9]).mean()
    assert log_likelihood(scores, np.array([1, 0])) == pytest.approx(expected)
    assert np.isfinite(log_likelihood(np.array([[0.0, 1e6]]), np.array([0])))


@given(
    arrays(np.float32, (3, 5), elements=st.floats(-1000, 1000, width=32)),
    st.integers(-1000, 1000),
)
def test_softmax_is_a_distribution_whatever_the_scores(scores, shift):
    found = softmax(scores)
    np.testing.assert_allclose(found.sum(axis=-1), 1)
    assert (found >= 0).all()
    np.testing.assert_allclose(softmax(scores.astype(float) + shift), found, atol=1e-6)


def test_softmax_of_known_odds():
    np.testing.assert_allclose(softmax(np.log([[1.0, 3.0]])), [[0.25, 0.75]])
