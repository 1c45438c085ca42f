"""Exit heads of label-word tasks, in pure NumPy: what a layer says, freed of its bias.

A head scores the label words c after layer l from their log-probabilities z[l, c]:

    plain       z[l, c]
    calibrated  z[l, c] - b[l, c]               b: mean of z over the table's rows of the task
    fused       (z[l, c] - b[l, c]) / s[l] + weight * log p(c)
                                                s: spread of the calibrated scores of layer l
                                                p: what the neighbours vote

Only the best label word matters, so each head amounts to biases on the label words' logits:
0, -b[l, c], and -b[l, c] + weight * s[l] * log p(c). A calibrated or fused exit has the depth of
the plain one and needs nothing of the engine but `logit_bias`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Head = Literal["plain", "calibrated", "fused"]

FUSED_K = 32
"""Neighbours that vote on a table row."""
VOTE_TEMPERATURE = 0.1
"""A neighbour less similar by this much has 1/e of the vote."""
VOTE_PRIOR = 0.5
"""Votes every label word starts with."""
BLOCK = 2048
"""Rows compared with the whole task at once: against 50,000 rows in float32 that is 400 MB."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """bias: [num_layers, num_labels]; spread: [num_layers], above 0."""

    bias: Array
    spread: Array

    @classmethod
    def of(cls, label_logprobs: NDArray[np.float32]) -> Calibration:
        """From a task's rows, [n, num_layers, num_labels]."""
        logprobs = label_logprobs.astype(np.float64)
        bias = logprobs.mean(axis=0)
        spread = (logprobs - bias).std(axis=(0, 2))
        return cls(bias, np.maximum(spread, np.finfo(np.float32).eps))

    def scores(
        self, head: Head, label_logprobs: NDArray[np.float32], log_vote: Array, weight: float
    ) -> Array:
        """Scores of rows under `head`, [n, num_layers, num_labels].

        log_vote: [n, num_labels], see `log_votes`; used, with its weight, by the fused head.
        """
        if head == "plain":
            return label_logprobs.astype(np.float64)
        calibrated = label_logprobs - self.bias
        if head == "calibrated":
            return calibrated
        return calibrated / self.spread[:, None] + weight * log_vote[:, None]

    def label_bias(self, head: Head, layer: int, log_vote: Array, weight: float) -> Array:
        """[num_labels] to add to the label words' logits after `layer` (1..num_layers).

        log_vote: [num_labels], see `log_votes`; used by the fused head.
        """
        if head == "plain":
            return np.zeros(self.bias.shape[1])
        calibrated = -self.bias[layer - 1]
        if head == "calibrated":
            return calibrated
        return calibrated + weight * self.spread[layer - 1] * log_vote


def log_votes(similarities: Array, labels: NDArray[np.int32], counts: NDArray[np.int64]) -> Array:
    """[..., num_labels] log of the share of the neighbours' votes for each label word.

    similarities: [..., k] cosine, of the neighbours; labels: [..., k], their gold labels.
    counts: [num_labels] rows with each label among those searched; votes are divided by them, so
        that a frequent label is not voted for because it is frequent.
    """
    weights = np.exp((similarities - similarities.max(axis=-1, keepdims=True)) / VOTE_TEMPERATURE)
    num_labels = len(counts)
    cast = (weights[..., None] * (labels[..., None] == np.arange(num_labels))).sum(axis=-2)
    balanced = cast * counts.mean() / np.maximum(counts, 1) + VOTE_PRIOR
    return np.log(balanced / balanced.sum(axis=-1, keepdims=True))


def label_counts(labels: NDArray[np.int32], num_labels: int) -> NDArray[np.int64]:
    """[num_labels] rows with each label."""
    return np.bincount(labels, minlength=num_labels)


def leave_one_out_log_votes(
    vectors: NDArray[np.float32], labels: NDArray[np.int32], num_labels: int, k: int = FUSED_K
) -> Array:
    """[n, num_labels]: `log_votes` on each row by its k nearest other rows.

    vectors: [n, dimension], L2-normalised; fewer than two rows vote for nothing (uniform).
    """
    n = len(vectors)
    if n < 2:
        return np.full((n, num_labels), -np.log(num_labels))
    counts = label_counts(labels, num_labels)
    votes = [
        log_votes(similarities.astype(np.float64), labels[nearest], counts)
        for nearest, similarities in nearest_others(vectors, min(k, n - 1))
    ]
    return np.concatenate(votes)


def nearest_others(
    vectors: NDArray[np.float32], k: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """For blocks of rows, in order: the k nearest other rows of each, and their similarities."""
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK] @ vectors.T
        rows = np.arange(len(block))
        block[rows, start + rows] = -np.inf
        nearest = np.argpartition(-block, k - 1, axis=1)[:, :k]
        yield nearest, np.take_along_axis(block, nearest, axis=1)
