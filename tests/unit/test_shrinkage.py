"""Neighbours of free text are believed as far as a task's own rows bear them out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raee_serve.exits.neighbours import evidence_weights, nearest_others
from raee_serve.exits.rule import expected, shallowest
from raee_serve.exits.shrinkage import kept_quality, shrunk, trust_in

pytestmark = pytest.mark.unit

ROWS, LAYERS = 400, 6
MEAN = np.array([[0.1, 0.3, 0.5, 0.6, 0.7, 0.8], [0.2, 0.5, 0.7, 0.75, 0.78, 0.0]])


@pytest.fixture(scope="module")
def vectors():
    drawn = np.random.default_rng(1).normal(size=(ROWS, 3)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def neighbours(vectors, k=24):
    return list(nearest_others(vectors, np.arange(len(vectors)), vectors, k))


def quality_of(shift):
    """[ROWS, 2, LAYERS], each row's exits but full depth better or worse than the mean."""
    quality = np.broadcast_to(MEAN, (ROWS, *MEAN.shape)).copy()
    quality[:, :, :-1] += shift[:, None, None]
    return quality.astype(np.float32)


def chance(seed=2):
    return np.random.default_rng(seed).normal(size=ROWS) * 0.1


def exits(quality, near, close, budget):
    return shallowest(expected(quality[near], evidence_weights(close)), budget)


def test_what_depends_on_the_text_is_believed(vectors):
    told = 0.1 * vectors[:, 0] + 0.1 * chance()
    assert trust_in(quality_of(told), neighbours(vectors)) > 0.8


@pytest.mark.parametrize("seed", range(8))
def test_chance_is_not(vectors, seed):
    assert trust_in(quality_of(chance(seed)), neighbours(vectors)) < 0.3


def test_there_is_nothing_to_believe_where_all_rows_are_alike(vectors):
    assert trust_in(quality_of(np.zeros(ROWS)), neighbours(vectors)) == 0


def test_by_chance_no_row_leaves_where_the_task_loses_too_much(vectors):
    quality = quality_of(chance())
    [(near, close)] = neighbours(vectors, 4)
    before, _ = exits(quality, near, close, 0.9)
    told = shrunk(quality, trust_in(quality, [(near, close)]))
    after, heads = exits(told, near, close, 0.9)
    kept = kept_quality(quality)[heads, after - 1]
    assert (before < 4).mean() > 0.25 and (after < 4).mean() < 0.02 and kept.min() > 0.85


shares = arrays(np.float32, (7, 2, 5), elements=st.floats(0, 1, width=32))


@given(shares, st.floats(0, 1))
def test_what_the_task_keeps_and_each_rows_full_depth_stay(quality, trust):
    quality[:, 1, -1] = 0
    quality[:, 0, -1] = np.maximum(quality[:, 0, -1], 0.25)
    told = shrunk(quality, trust)
    assert told.min() >= 0
    np.testing.assert_allclose(told[:, 0, -1], quality[:, 0, -1], rtol=1e-5)
    np.testing.assert_allclose(kept_quality(told), kept_quality(quality), rtol=1e-4, atol=1e-5)


@given(shares)
def test_wholly_believed_rows_stay_as_they_are(quality):
    np.testing.assert_allclose(shrunk(quality, 1.0), quality, rtol=1e-5, atol=1e-6)


@given(shares)
def test_without_trust_every_row_says_what_the_task_does(quality):
    told = shrunk(quality, 0.0)
    full = quality[:, 0, -1]
    np.testing.assert_allclose(
        told, full[:, None, None] * kept_quality(quality), rtol=1e-4, atol=1e-6
    )


def test_quality_that_full_depth_has_none_of_is_no_measure():
    assert not kept_quality(np.zeros((3, 2, 4), np.float32)).any()
