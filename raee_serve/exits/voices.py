"""How loudly the voices that answer a label task are heard: stacked generalisation (Wolpert 1992).

A label's score is a weighted sum of a few voices' scores: the state after a layer, the encoder's
vector, the neighbours' vote. The weights, one a voice, maximise the likelihood of the gold labels
of a task's rows; scores are out of sample. With one voice this is temperature scaling (Guo et al.
2017, arXiv 1706.04599). Weights are at least 0: a voice that does not help is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from raee_serve.exits.neighbours import Array

FIT_ROWS = 4096
"""Rows that the weights are fitted to, a seeded sample of larger tasks."""
SHRINKAGE = 1.0
"""Pull towards 0, in rows' log-likelihood for each unit of squared weight of standardised scores:
few rows are heard with caution."""


def softmax(scores: NDArray) -> Array:
    """[..., num_labels] -> probabilities."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True), dtype=np.float64)
    return powers / powers.sum(axis=-1, keepdims=True)


def mixed(voices: Sequence[NDArray], weights: Sequence[float] | NDArray) -> Array:
    """Voices, each [..., num_labels], as one score a label."""
    return np.sum([weight * voice for weight, voice in zip(weights, voices, strict=True)], axis=0)


def fitted_weights(voices: Sequence[NDArray], golds: NDArray[np.int32]) -> Array:
    """[len(voices)] weights. voices: each [n, num_labels]; golds: [n]."""
    sample = np.random.default_rng(0).permutation(len(golds))[:FIT_ROWS]
    scores = np.stack([voice[sample] for voice in voices], axis=-1).astype(np.float64)
    scores -= scores.mean(axis=1, keepdims=True)
    scale = np.maximum(scores.std(axis=(0, 1)), 1e-9)
    scores, golds = scores / scale, golds[sample]
    own = np.take_along_axis(scores, golds[:, None, None], axis=1)[:, 0]

    def loss(weights: Array) -> tuple[float, Array]:
        probabilities = softmax(scores @ weights)
        likelihood = np.log(np.maximum(probabilities[np.arange(len(golds)), golds], 1e-300)).sum()
        expected = np.einsum("nc,ncv->v", probabilities, scores)
        slope = expected - own.sum(axis=0) + 2 * SHRINKAGE * weights
        return (SHRINKAGE * float(weights @ weights) - likelihood) / len(golds), slope / len(golds)

    start, bounds = np.ones(len(voices)), [(0.0, None)] * len(voices)
    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x / scale


def log_likelihood(scores: NDArray, golds: NDArray[np.int32]) -> float:
    """Mean over rows of the log-probability of the gold label."""
    own = softmax(scores)[np.arange(len(golds)), golds]
    return float(np.log(np.maximum(own, 1e-300)).mean())
