"""Ridge regression by folds is what scikit-learn fits to the other folds' rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from raee_serve.exits import ridge
from raee_serve.exits.ridge import FOLDS, FoldedRidge, fold_of
from tests.unit.table_rows import row_ids

pytestmark = pytest.mark.unit

N, WIDTH, LABELS, STRENGTH = 90, 12, 3, 7.0


@pytest.fixture(scope="module")
def rows():
    """(features, golds, folds); features far from standardised."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(N, WIDTH)) * draw.uniform(0.1, 30, WIDTH) + draw.normal(size=WIDTH)
    golds = draw.integers(0, LABELS, N).astype(np.int32)
    folds = np.array([fold_of(row_id) for row_id in row_ids(N)])
    return features.astype(np.float32), golds, folds


def by_hand(features, golds, fitted, asked):
    """Scores of the rows `asked` by a ridge on the rows `fitted`, standardised by all rows."""
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    model = Ridge(alpha=STRENGTH, solver="cholesky")
    model.fit(standard[fitted].astype(float), np.eye(LABELS)[golds[fitted]])
    return model.predict(standard[asked].astype(float))


def test_each_rows_scores_come_from_a_fit_without_its_fold(rows):
    features, golds, folds = rows
    scores = FoldedRidge(features, golds, LABELS, folds).out_of_fold(STRENGTH)
    for fold in range(FOLDS):
        expected = by_hand(features, golds, folds != fold, folds == fold)
        np.testing.assert_allclose(scores[folds == fold], expected, atol=1e-4)


def test_the_probe_is_fitted_to_all_rows(rows):
    features, golds, folds = rows
    probe = FoldedRidge(features, golds, LABELS, folds).probe(STRENGTH)
    everyone = np.ones(N, bool)
    expected = by_hand(features, golds, everyone, everyone)
    np.testing.assert_allclose(probe.scores(features), expected, atol=1e-4)


def test_no_row_hears_its_own_label(rows):
    features, golds, folds = rows
    turned = np.where(folds == 2, (golds + 1) % LABELS, golds).astype(np.int32)
    honest, other = (
        FoldedRidge(features, own, LABELS, folds).out_of_fold(STRENGTH) for own in (golds, turned)
    )
    np.testing.assert_allclose(other[folds == 2], honest[folds == 2], atol=1e-5)
    assert np.abs(other - honest)[folds != 2].max() > 0.1


def test_a_file_of_half_floats_is_read_in_blocks(rows, tmp_path, monkeypatch):
    features, golds, folds = rows
    half = features.astype(np.float16)
    expected = FoldedRidge(half, golds, LABELS, folds).out_of_fold(STRENGTH)
    in_file = np.memmap(tmp_path / "states", np.float16, "w+", shape=half.shape)
    in_file[:] = half
    monkeypatch.setattr(ridge, "BLOCK", 7)
    found = FoldedRidge(in_file, golds, LABELS, folds).out_of_fold(STRENGTH)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_feature_that_never_changes_is_no_division_by_zero(rows):
    features, golds, folds = rows
    flat = features.copy()
    flat[:, 4] = 3.0
    assert np.isfinite(FoldedRidge(flat, golds, LABELS, folds).out_of_fold(STRENGTH)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(rows, value):
    features, golds, folds = rows
    broken = features.copy()
    broken[-1, -1] = value
    with pytest.raises(ValueError, match="not finite"):
        FoldedRidge(broken, golds, LABELS, folds)


def test_a_fold_without_rows_is_no_fault(rows):
    features, golds, folds = rows
    found = FoldedRidge(features, golds, LABELS, np.minimum(folds, 3)).out_of_fold(STRENGTH)
    assert np.isfinite(found).all()


@given(st.lists(st.text("0123456789abcdef", min_size=32, max_size=32)), st.integers(0, 9))
def test_rows_that_are_added_move_no_other(ids, place):
    before = {row_id: fold_of(row_id) for row_id in ids}
    grown = [*ids[:place], *row_ids(3), *ids[place:]]
    after = {row_id: fold_of(row_id) for row_id in grown}
    assert before.items() <= after.items() and set(after.values()) <= set(range(FOLDS))


def test_folds_are_about_equally_large():
    sizes = np.bincount([fold_of(row_id) for row_id in row_ids(2000)])
    assert len(sizes) == FOLDS and sizes.min() > 330 and sizes.max() < 470
