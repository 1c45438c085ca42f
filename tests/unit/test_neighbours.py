"""What neighbours say together, against the definitions spelled out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raee_serve.exits import neighbours
from raee_serve.exits.neighbours import (
    CERTAINTY_SPREAD,
    EVIDENCE_TEMPERATURE,
    VOTE_PRIOR,
    VOTE_TEMPERATURE,
    evidence_weights,
    log_votes,
    nearest_others,
)
from tests.unit.table_rows import unit_vectors

pytestmark = pytest.mark.unit

cosines = arrays(np.float32, (3, 6), elements=st.floats(-1, 1, width=32))
shares = arrays(np.float32, (3, 6), elements=st.floats(0, 1, width=32))


@given(cosines, shares, arrays(np.float32, 3, elements=st.floats(0, 1, width=32)))
def test_weights_sum_to_one_and_leave_nobody_out(similarities, certainties, certainty):
    for weights in (
        evidence_weights(similarities),
        evidence_weights(similarities, certainties, certainty),
    ):
        np.testing.assert_allclose(weights.sum(axis=-1), 1)
        assert (weights > 0).all() and np.isfinite(weights).all()


@given(cosines)
def test_of_two_the_nearer_has_the_larger_weight(similarities):
    weights, order = evidence_weights(similarities), np.argsort(similarities, axis=-1)
    assert (np.diff(np.take_along_axis(weights, order, axis=-1), axis=-1) >= 0).all()


def test_weights_fall_by_the_temperature():
    near, far = evidence_weights(np.array([0.9, 0.9 - EVIDENCE_TEMPERATURE]))
    assert near / far == pytest.approx(np.e, rel=1e-6)


def test_neighbours_of_another_certainty_count_for_less():
    alike = np.full(3, 0.7)
    weights = evidence_weights(alike, np.array([0.9, 0.9 + CERTAINTY_SPREAD, 0.5]), np.array(0.9))
    assert weights[0] / weights[1] == pytest.approx(np.exp(0.5), rel=1e-6)
    assert weights[2] < 1e-6
    far_but_alike = evidence_weights(np.array([0.9, 0.8]), np.array([0.5, 0.9]), np.array(0.9))
    assert far_but_alike[1] > 0.99


def test_where_nobody_is_alike_all_say_a_little():
    weights = evidence_weights(np.full(4, 0.5), np.zeros(4), np.array(1.0))
    np.testing.assert_allclose(weights, 0.25, rtol=1e-6)


@given(
    cosines,
    arrays(np.int32, (3, 6), elements=st.integers(0, 3)),
    arrays(np.int64, 4, elements=st.integers(0, 50)),
)
def test_votes_are_what_a_loop_counts(similarities, labels, counts):
    counts[0] += 1
    found = log_votes(similarities, labels, counts)
    for prompt in range(3):
        cast = np.zeros(4)
        nearest = similarities[prompt].max()
        for similarity, label in zip(similarities[prompt], labels[prompt], strict=True):
            cast[label] += np.exp((float(similarity) - float(nearest)) / VOTE_TEMPERATURE)
        balanced = [
            VOTE_PRIOR + votes * counts.mean() / max(count, 1)
            for votes, count in zip(cast, counts, strict=True)
        ]
        expected = np.log(balanced / np.sum(balanced))
        np.testing.assert_allclose(found[prompt], expected, rtol=1e-6)
        np.testing.assert_allclose(
            log_votes(similarities[prompt], labels[prompt], counts), expected, rtol=1e-6
        )


def test_votes_are_balanced_by_how_frequent_a_label_is():
    labels = np.array([0, 0, 0, 1], np.int32)
    equal = np.full(4, 0.5)
    np.testing.assert_allclose(np.exp(log_votes(equal, labels, np.array([30, 10]))), [0.5, 0.5])
    unbalanced = np.exp(log_votes(equal, labels, np.array([20, 20])))
    np.testing.assert_allclose(unbalanced, (np.array([3, 1]) + VOTE_PRIOR) / 5)


@pytest.mark.parametrize("block", [1, 7, 2048])
def test_nobody_is_near_to_itself(block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    vectors, k = unit_vectors(30), 5
    found = list(nearest_others(vectors, np.arange(30), vectors, k))
    near, close = (np.concatenate(parts) for parts in zip(*found, strict=True))
    similarities = vectors @ vectors.T
    for row in range(30):
        others = np.delete(np.arange(30), row)
        expected = others[np.argsort(-similarities[row, others], kind="stable")[:k]]
        assert near[row].tolist() == expected.tolist()
        np.testing.assert_allclose(close[row], similarities[row, expected], rtol=1e-6)


def test_who_is_none_of_them_is_compared_with_all():
    vectors = unit_vectors(12)
    own = np.array([-1, 3])
    ((near, _),) = nearest_others(vectors[[3, 3]], own, vectors, 12 - 1)
    assert near[0, 0] == 3 and 3 not in near[1]


def test_as_many_as_there_are():
    vectors = unit_vectors(4)
    ((near, close),) = nearest_others(vectors, np.arange(4), vectors, 3)
    assert near.shape == (4, 3) and (np.diff(close, axis=1) <= 0).all()
    ((none, _),) = nearest_others(vectors[:1], np.zeros(1, int), vectors[:1], 0)
    assert none.shape == (1, 0)
