"""What decides nothing, for comparison. All of it is chosen and fitted on a table's rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

INVERSE_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""scikit-learn's C, from which the logistic regression chooses."""
HELD_OUT = 0.15
"""Share of the rows on which it is chosen."""


def logistic_regression(
    vectors: NDArray[np.float32], golds: NDArray[np.int32], queries: NDArray[np.float32]
) -> NDArray[np.int32]:
    """[len(queries)] labels, by scikit-learn's logistic regression on the encoder's vectors.

    vectors, golds: of the rows that it is fitted to. C is chosen by accuracy on HELD_OUT of them.
    """
    from sklearn.linear_model import LogisticRegression

    order = np.random.default_rng(0).permutation(len(golds))
    held, kept = np.split(order, [round(HELD_OUT * len(order))])
    if len(np.unique(golds[kept])) < 2:
        return np.full(len(queries), np.bincount(golds).argmax(), np.int32)

    def fitted(c: float, rows: NDArray[np.int64]) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=1000).fit(vectors[rows], golds[rows])

    def held_out(c: float) -> float:
        return float(fitted(c, kept).score(vectors[held], golds[held])) if len(held) else 0.0

    with threadpool_limits(1, "blas"):
        predicted: NDArray[np.int32] = fitted(max(INVERSE_STRENGTHS, key=held_out), order).predict(
            queries
        )
    return predicted
