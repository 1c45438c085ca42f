"""The stacked head: how far to trust a layer, and how far the neighbours' vote, layer by layer.

For each layer a conditional logit over the label words is fitted to the table's own rows, the
vote on each being that of the other rows (stacked generalisation, Wolpert 1992; with one number a
layer for what the layer says it is temperature scaling, Guo et al. 2017, arXiv 1706.04599):

    log p(c) = scale * (z[c] - mean z[c]) / spread + vote_weight * log vote(c) + offset[c] + const

The offsets learn how frequent each label is among the rows. A layer that says nothing is left with
the vote. Being probabilities that fit, the scores of different layers can be compared, which is
what a rule does with them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from raee_serve.retrieval.heads import Array, Head, bias_and_spread

FIT_ROWS = 8192
"""Rows that the fit is made on, a seeded sample of larger tasks: it has a handful of parameters."""
SHRINKAGE = 2.0
"""Pull towards a scale of 1 spread, a vote weight of 1 and no offsets, in rows' log-likelihood for
each unit of squared distance: what few rows have to say is heard with caution."""
MIN_SCALE = 1e-2


def stacked(label_logprobs: NDArray[np.float32], golds: NDArray[np.int32], log_vote: Array) -> Head:
    """Fitted to a task's rows.

    label_logprobs: [n, num_layers, num_labels]; golds: [n]; log_vote: [n, num_labels], each row's
    by other rows.
    """
    bias, spread = bias_and_spread(label_logprobs)
    sample = np.random.default_rng(0).permutation(len(golds))[:FIT_ROWS]
    golds, log_vote = golds[sample], log_vote[sample]
    scale, vote_weight = np.empty(len(spread)), np.empty(len(spread))
    for layer, width in enumerate(spread):
        said = (label_logprobs[sample, layer] - bias[layer]) / width
        own, vote_weight[layer], offset = _fit(said, log_vote, golds)
        scale[layer] = own / width
        bias[layer] -= offset / scale[layer]
    return Head(scale, bias, vote_weight)


def stacked_vote(golds: NDArray[np.int32], log_vote: Array) -> tuple[float, Array]:
    """(weight, [num_labels] offsets) of the vote alone, fitted in the same way: what the stacked
    head would be without a model to listen to."""
    _, weight, offset = _fit(np.zeros_like(log_vote), log_vote, golds)
    return weight, offset


def _fit(said: Array, log_vote: Array, golds: NDArray[np.int32]) -> tuple[float, float, Array]:
    """Scale, vote weight and [num_labels] offsets of greatest likelihood, shrunk.

    said, log_vote: [n, num_labels].
    """
    n, num_labels = said.shape
    rows = np.arange(n)

    def loss(parameters: Array) -> tuple[float, Array]:
        own, weight, offset = parameters[0], parameters[1], parameters[2:]
        scores = own * said + weight * log_vote + offset
        scores -= scores.max(axis=1, keepdims=True)
        log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        error = np.exp(log_p)
        error[rows, golds] -= 1
        slope = np.array([(error * said).sum(), (error * log_vote).sum(), *error.sum(axis=0)]) / n
        away = parameters - start
        return (
            pull * away @ away - log_p[rows, golds].mean(),
            slope + 2 * pull * away,
        )

    pull = SHRINKAGE / n
    start = np.array([1.0, 1.0, *np.zeros(num_labels)])
    bounds = [(MIN_SCALE, None), (0, None), *[(None, None)] * num_labels]
    best = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return best[0], best[1], best[2:]
