"""Heads: what biases on the label words' logits make of a layer's answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raee_serve.retrieval.heads import (
    MIN_SPREAD,
    VOTE_PRIOR,
    LeaveOneOutVotes,
    bias_and_spread,
    calibrated,
    fused,
    label_counts,
    log_votes,
    plain,
)
from raee_serve.retrieval.stacking import stacked
from raee_serve.table.evidence import label_evidence
from tests.unit.table_rows import unit_vectors

pytestmark = pytest.mark.unit

N, LAYERS, LABELS = 40, 3, 4


def logprobs(seed):
    raw = np.random.default_rng(seed).normal(size=(N, LAYERS, LABELS)) * [[1], [3], [0.2]]
    raw[:, :, 1] += 5  # a layer that always says the same word
    return (raw - np.log(np.exp(raw).sum(axis=-1, keepdims=True))).astype(np.float32)


def random_golds(seed):
    return np.random.default_rng(seed).integers(0, LABELS, N).astype(np.int32)


def random_votes(seed):
    return np.log(np.random.default_rng(seed).dirichlet(np.ones(LABELS), N))


@given(st.integers(0, 50))
def test_calibrated_layers_favour_no_word_and_have_unit_spread(seed):
    votes = random_votes(seed)
    scores = calibrated(logprobs(seed)).scores(logprobs(seed), votes)
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=1e-5)
    alone = fused(logprobs(seed), vote_weight=0.0).scores(logprobs(seed), votes)
    np.testing.assert_allclose(alone.std(axis=(0, 2)), 1, rtol=1e-5)


@given(st.integers(0, 50), st.integers(1, LAYERS), st.floats(0.1, 4))
def test_biases_give_the_answer_of_the_head(seed, layer, weight):
    """What the server adds to logits decides as the scores that exit information came from."""
    own, votes = logprobs(seed), random_votes(seed + 1)
    heads = [
        plain(LAYERS, LABELS),
        calibrated(own),
        fused(own, weight),
        stacked(own, random_golds(seed), votes),
    ]
    for head in heads:
        expected = head.scores(own, votes)[:, layer - 1]
        biased = own[:, layer - 1] + np.stack([head.label_bias(layer, vote) for vote in votes])
        gaps = np.sort(expected, axis=1)
        clear = gaps[:, -1] - gaps[:, -2] > 1e-6
        assert (biased.argmax(axis=1) == expected.argmax(axis=1))[clear].all()


def test_a_layer_that_says_one_word_to_all_is_not_blown_up():
    same = np.tile(np.log([0.7, 0.3]).astype(np.float32), (5, 2, 1))
    assert (bias_and_spread(same)[1] == MIN_SPREAD).all()
    golds, votes = np.array([0, 1, 0, 1, 0], np.int32), np.zeros((5, 2))
    for head in (fused(same, 1.0), stacked(same, golds, votes)):
        assert np.isfinite(head.scores(same, votes)).all()
        assert (head.scale <= 1 / MIN_SPREAD).all()


def stacked_on(layers, votes, golds):
    """Fitted to n rows of which each layer, and the vote, says [n, num_labels]."""
    return stacked(np.stack(layers, axis=1).astype(np.float32), golds, votes)


@pytest.fixture(scope="module")
def facts():
    """golds, something that tells them two times out of three, and something that tells nothing."""
    rng = np.random.default_rng(4)
    golds = rng.choice(3, 3000, p=[0.6, 0.3, 0.1]).astype(np.int32)
    shown = np.where(rng.random(3000) < 0.66, golds, rng.integers(0, 3, 3000))
    telling = np.eye(3)[shown] * 2.0
    return golds, telling, rng.normal(size=(3000, 3))


def accuracy(head, layers, votes, golds):
    scores = head.scores(np.stack(layers, axis=1).astype(np.float32), votes)
    return (scores.argmax(axis=2) == golds[:, None]).mean(axis=0)


def test_stacking_trusts_what_tells_and_ignores_what_does_not(facts):
    golds, telling, noise = facts
    head = stacked_on([telling, noise], noise, golds)
    spread = bias_and_spread(np.stack([telling, noise], axis=1))[1]
    trust = head.scale * spread
    assert trust[0] > 10 * trust[1] and head.vote_weight.max() < 0.1
    head = stacked_on([noise, noise], telling, golds)
    assert (head.vote_weight > 0.5).all() and (head.scale * spread[1] < 0.1).all()


def test_stacking_takes_a_bias_out_and_learns_how_frequent_labels_are(facts):
    golds, telling, noise = facts
    biased = telling + np.array([0.0, 0.0, 9.0])  # says the rare label to nearly everyone
    head = stacked_on([biased, noise], np.zeros((3000, 3)), golds)
    at_biased, at_noise = accuracy(head, [biased, noise], np.zeros((3000, 3)), golds)
    assert at_biased > 0.75
    assert at_noise == pytest.approx((golds == 0).mean(), abs=0.01)


def test_stacked_probabilities_fit(facts):
    """The mean probability of the answers is the share of them that is right."""
    golds, telling, noise = facts
    layers, votes = [telling, noise], noise * 5
    head = stacked_on(layers, votes, golds)
    scores = head.scores(np.stack(layers, axis=1).astype(np.float32), votes)
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    said = (p.max(axis=2) / p.sum(axis=2)).mean(axis=0)
    np.testing.assert_allclose(said, accuracy(head, layers, votes, golds), atol=0.02)


@pytest.mark.parametrize("rows", [1, 2])
def test_stacking_a_row_or_two_stays_finite(rows):
    head = stacked(logprobs(0)[:rows], random_golds(0)[:rows], random_votes(0)[:rows])
    assert np.isfinite(head.bias).all() and (head.scale > 0).all()


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
    votes = LeaveOneOutVotes(vectors, labels, 2, max_k=8).log_votes(5)
    counts = label_counts(labels, 2)
    similarities = vectors @ vectors.T
    for row in (0, 17, 59):
        others = np.delete(np.arange(60), row)
        nearest = others[np.argsort(-similarities[row, others])[:5]]
        expected = log_votes(similarities[row, nearest].astype(float), labels[nearest], counts)
        np.testing.assert_allclose(votes[row], expected, rtol=1e-5)


def test_a_single_row_is_voted_on_by_nobody():
    votes = LeaveOneOutVotes(unit_vectors(1), np.zeros(1, np.int32), 3, max_k=8).log_votes(5)
    np.testing.assert_allclose(np.exp(votes), 1 / 3)


def test_evidence_is_the_probability_of_a_right_answer():
    scores = np.array([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [3.0, 0.0]]])
    evidence = label_evidence(scores, np.array([0, 1], np.int32))
    np.testing.assert_allclose(evidence, [[1 / (1 + np.exp(-2)), 0], [0, 0]], rtol=1e-6)
