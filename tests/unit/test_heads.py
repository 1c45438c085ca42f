"""Heads: what biases on the label words' logits make of a layer's answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raee_serve.retrieval.heads import (
    VOTE_PRIOR,
    Calibration,
    label_counts,
    leave_one_out_log_votes,
    log_votes,
)
from raee_serve.table.evidence import label_evidence
from tests.unit.table_rows import unit_vectors

pytestmark = pytest.mark.unit

N, LAYERS, LABELS = 40, 3, 4


def logprobs(seed):
    raw = np.random.default_rng(seed).normal(size=(N, LAYERS, LABELS)) * [[1], [3], [0.2]]
    raw[:, :, 1] += 5  # a layer that always says the same word
    return (raw - np.log(np.exp(raw).sum(axis=-1, keepdims=True))).astype(np.float32)


@given(st.integers(0, 50))
def test_calibrated_layers_favour_no_word_and_have_unit_spread(seed):
    calibration = Calibration.of(logprobs(seed))
    scores = calibration.scores("calibrated", logprobs(seed), np.zeros((N, LABELS)), 1.0)
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=1e-5)
    spread = (scores / calibration.spread[:, None]).std(axis=(0, 2))
    np.testing.assert_allclose(spread, 1, rtol=1e-5)


@given(st.integers(0, 50), st.integers(1, LAYERS), st.floats(0.1, 4))
def test_biases_give_the_answer_of_the_head(seed, layer, weight):
    """What the server adds to logits decides as the scores that exit information came from."""
    own = logprobs(seed)
    calibration = Calibration.of(own)
    vote = np.log(np.random.default_rng(seed + 1).dirichlet(np.ones(LABELS)))
    votes = np.tile(vote, (N, 1))
    scores = {
        head: calibration.scores(head, own, votes, weight)[:, layer - 1]
        for head in ("plain", "calibrated", "fused")
    }
    for head, expected in scores.items():
        biased = own[:, layer - 1] + calibration.label_bias(head, layer, vote, weight)
        gaps = np.sort(expected, axis=1)
        clear = gaps[:, -1] - gaps[:, -2] > 1e-6
        assert (biased.argmax(axis=1) == expected.argmax(axis=1))[clear].all()


def test_a_layer_that_says_one_word_to_all_has_a_spread_above_zero():
    same = np.tile(np.log([0.7, 0.3]).astype(np.float32), (5, 2, 1))
    assert (Calibration.of(same).spread > 0).all()


def test_votes_are_balanced_by_how_frequent_a_label_is():
    labels = np.array([0, 0, 0, 1], np.int32)
    equal = np.full(4, 0.5)
    votes = np.exp(log_votes(equal, labels, np.array([30, 10])))
    np.testing.assert_allclose(votes, [0.5, 0.5])
    unbalanced = np.exp(log_votes(equal, labels, np.array([20, 20])))
    np.testing.assert_allclose(unbalanced, (np.array([3, 1]) + VOTE_PRIOR) / 5)


def test_nearer_neighbours_have_more_of_the_vote():
    labels, counts = np.array([0, 1], np.int32), np.array([5, 5])
    votes = log_votes(np.array([0.9, 0.6]), labels, counts)
    assert votes[0] > votes[1]
    assert log_votes(np.array([[0.9, 0.6]] * 3), np.array([labels] * 3), counts).shape == (3, 2)


def test_a_row_has_no_vote_on_itself():
    vectors = unit_vectors(60, seed=3)
    labels = np.arange(60, dtype=np.int32) % 2
    votes = leave_one_out_log_votes(vectors, labels, 2, k=5)
    counts = label_counts(labels, 2)
    similarities = vectors @ vectors.T
    for row in (0, 17, 59):
        others = np.delete(np.arange(60), row)
        nearest = others[np.argsort(-similarities[row, others])[:5]]
        expected = log_votes(similarities[row, nearest].astype(float), labels[nearest], counts)
        np.testing.assert_allclose(votes[row], expected, rtol=1e-5)


def test_a_single_row_is_voted_on_by_nobody():
    votes = leave_one_out_log_votes(unit_vectors(1), np.zeros(1, np.int32), 3)
    np.testing.assert_allclose(np.exp(votes), 1 / 3)


def test_evidence_is_the_probability_of_a_right_answer():
    scores = np.array([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [3.0, 0.0]]])
    evidence = label_evidence(scores, np.array([0, 1], np.int32))
    np.testing.assert_allclose(evidence, [[1 / (1 + np.exp(-2)), 0], [0, 0]], rtol=1e-6)
