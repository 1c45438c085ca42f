"""The encoder's voice: what scikit-learn fits to the other folds' rows, for every label."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from raee_serve.exits import logistic as logistic_module
from raee_serve.exits.logistic import logistic
from raee_serve.exits.ridge import FOLDS, fold_of
from raee_serve.exits.voices import softmax
from tests.unit.table_rows import row_ids, unit_vectors

pytestmark = pytest.mark.unit

N, LABELS, C = 120, 3, 3.0
FOLD_OF = np.array([fold_of(row_id) for row_id in row_ids(N)])


@pytest.fixture(autouse=True)
def one_strength(monkeypatch):
    monkeypatch.setattr(logistic_module, "INVERSE_STRENGTHS", (C,))


def rows(labels=LABELS, seed=0):
    """(vectors, golds), vectors near to one of their label's own."""
    draw = np.random.default_rng(seed)
    golds = draw.integers(0, labels, N).astype(np.int32)
    vectors = unit_vectors(labels, 10)[golds] + 0.4 * draw.normal(size=(N, 10))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), golds


def by_hand(vectors, golds, fitted, asked):
    model = LogisticRegression(C=C, max_iter=200, tol=1e-3)
    return model.fit(vectors[fitted], golds[fitted]).predict_proba(vectors[asked])


@pytest.mark.parametrize("labels", [2, LABELS])
def test_each_rows_scores_come_from_a_fit_without_its_fold(labels):
    vectors, golds = rows(labels)
    probe, scores = logistic(vectors, golds, labels, FOLD_OF)
    for fold in range(FOLDS):
        expected = by_hand(vectors, golds, fold != FOLD_OF, fold == FOLD_OF)
        np.testing.assert_allclose(softmax(scores[fold == FOLD_OF]), expected, atol=1e-4)
    everyone = np.ones(N, bool)
    expected = by_hand(vectors, golds, everyone, everyone)
    np.testing.assert_allclose(softmax(probe.scores(vectors)), expected, atol=1e-4)


def test_no_row_hears_its_own_label():
    vectors, golds = rows()
    turned = np.where(FOLD_OF == 2, (golds + 1) % LABELS, golds).astype(np.int32)
    honest, other = (logistic(vectors, own, LABELS, FOLD_OF)[1] for own in (golds, turned))
    np.testing.assert_array_equal(other[FOLD_OF == 2], honest[FOLD_OF == 2])
    assert np.abs(other - honest)[FOLD_OF != 2].max() > 0.1


def test_labels_that_no_row_has_are_never_answered():
    vectors, golds = rows(2)
    for labels in (golds, np.where(golds == 1, 4, 0).astype(np.int32)):
        probe, scores = logistic(vectors, labels, 6, FOLD_OF)
        assert scores.shape == (N, 6) and len(probe.bias) == 6
        unseen = np.setdiff1d(np.arange(6), labels)
        assert softmax(scores)[:, unseen].max() < 1e-4
        assert (scores.argmax(axis=1) == labels).mean() > 0.8


def test_a_label_of_one_row_is_unseen_where_it_is_left_out():
    vectors, golds = rows(2)
    golds[7] = 2
    probe, scores = logistic(vectors, golds, 3, FOLD_OF)
    assert softmax(scores)[7, 2] < 1e-4 < softmax(probe.scores(vectors))[7, 2]
    assert np.isfinite(scores).all()


def test_the_strength_that_tells_most_is_taken(monkeypatch):
    vectors, golds = rows()
    chosen = []
    for strengths in ((C,), (1e-6, C), (C, 1e-6)):
        monkeypatch.setattr(logistic_module, "INVERSE_STRENGTHS", strengths)
        chosen.append(logistic(vectors, golds, LABELS, FOLD_OF)[1])
    np.testing.assert_array_equal(chosen[1], chosen[0])
    np.testing.assert_array_equal(chosen[2], chosen[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(value):
    vectors, golds = rows()
    vectors[3, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        logistic(vectors, golds, LABELS, FOLD_OF)
