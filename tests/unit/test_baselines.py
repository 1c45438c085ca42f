"""What decides nothing: votes of neighbours, and a linear classifier on their vectors."""

import numpy as np
import pytest

from raee_serve.exits.baselines import logistic_regression
from raee_serve.exits.neighbours import log_votes, neighbour_votes
from tests.unit.table_rows import unit_vectors

pytestmark = pytest.mark.unit

N = 80
VECTORS = unit_vectors(N)
GOLDS = (VECTORS[:, 0] > 0).astype(np.int32)


def test_votes_of_all_other_rows():
    found = neighbour_votes(VECTORS, np.arange(N), VECTORS, GOLDS, 3)
    counts = np.bincount(GOLDS, minlength=3)
    for row in (0, 7):
        others = np.delete(np.arange(N), row)
        expected = log_votes(VECTORS[others] @ VECTORS[row], GOLDS[others], counts)
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)


def test_who_is_no_row_is_voted_on_by_all():
    queries = unit_vectors(5, seed=1)
    found = neighbour_votes(queries, np.full(5, -1), VECTORS, GOLDS, 2)
    expected = log_votes(VECTORS @ queries[2], GOLDS, np.bincount(GOLDS))
    np.testing.assert_allclose(found[2], expected, rtol=1e-5)


def test_a_linear_rule_is_found_and_found_again():
    queries = unit_vectors(200, seed=1)
    found = logistic_regression(VECTORS, GOLDS, queries)
    assert (found == (queries[:, 0] > 0)).mean() > 0.9
    np.testing.assert_array_equal(found, logistic_regression(VECTORS, GOLDS, queries))


def test_one_label_is_answered_always():
    golds = np.full(N, 2, np.int32)
    assert logistic_regression(VECTORS, golds, VECTORS[:3]).tolist() == [2, 2, 2]
