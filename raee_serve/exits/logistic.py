"""The encoder's voice: multinomial logistic regression on a task's vectors, by scikit-learn.

With many labels it reads short vectors far better than ridge regression does. States are longer,
and a fit of every layer of them would take minutes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raee_serve.exits.probes import Probe
from raee_serve.exits.ridge import FOLDS
from raee_serve.exits.voices import log_likelihood

INVERSE_STRENGTHS = (1.0, 3.0, 10.0, 30.0)
"""scikit-learn's C; the one with the best likelihood on the first fold is taken for all."""
ITERATIONS = 200
UNSEEN = -15.0
"""Score of a label that none of the fitted rows has, where others are around 0."""


def logistic(
    vectors: NDArray[np.float32],
    golds: NDArray[np.int32],
    num_labels: int,
    folds: NDArray[np.int64],
) -> tuple[Probe, NDArray[np.float32]]:
    """The map of all rows, and the scores [n, num_labels] of each row by one fitted without its
    fold. Raises ValueError for vectors that are not finite."""
    if not np.isfinite(vectors).all():
        raise ValueError("features hold values that are not finite")
    first = np.unique(folds)[0]
    held = folds == first

    def likelihood(c: float) -> float:
        probe = _fitted(vectors[~held], golds[~held], num_labels, c)
        return log_likelihood(probe.scores(vectors[held]), golds[held])

    best = max(INVERSE_STRENGTHS, key=likelihood)
    scores = np.empty((len(golds), num_labels), np.float32)
    for fold in range(FOLDS):
        out = folds == fold
        if out.any():
            scores[out] = _fitted(vectors[~out], golds[~out], num_labels, best).scores(vectors[out])
    return _fitted(vectors, golds, num_labels, best), scores


def _fitted(
    vectors: NDArray[np.float32], golds: NDArray[np.int32], num_labels: int, c: float
) -> Probe:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=ITERATIONS, tol=1e-3).fit(vectors, golds)
    weight = np.zeros((num_labels, vectors.shape[1]), np.float32)
    bias = np.full(num_labels, UNSEEN, np.float32)
    if len(model.classes_) == 2:  # scikit-learn tells how the second differs from the first
        first, second = model.classes_
        weight[second], bias[first], bias[second] = model.coef_[0], 0.0, model.intercept_[0]
    else:
        weight[model.classes_], bias[model.classes_] = model.coef_, model.intercept_
    return Probe(weight, bias)
