"""Exit heads of label-word tasks, in pure NumPy: what a layer says, freed of its bias.

A head scores the label words c after layer l from their log-probabilities z[l, c] and from what
the neighbours vote, p(c):

    score = scale[l] * (z[l, c] - bias[l, c]) + vote_weight[l] * log p(c)

               scale   bias                          vote_weight
    plain      1       0                             0
    calibrated 1       mean of z over the table      0
    fused      1/s[l]  mean of z over the table      one for all layers
    stacked    fitted by layer on the table's rows, see `stacking`

with s the spread of the calibrated scores over the table. Only the best label word matters, so
each head amounts to biases on the label words' logits: vote_weight[l] / scale[l] * log p(c)
- bias[l, c]. Such an exit has the depth of the plain one and needs nothing of the engine but
`logit_bias`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

HeadName = Literal["plain", "calibrated", "fused", "stacked"]

VOTE_K: dict[HeadName, int] = {"fused": 32, "stacked": 128}
"""Neighbours that vote on a table row, for the heads that ask them."""
VOTE_TEMPERATURE = 0.1
"""A neighbour less similar by this much has 1/e of the vote."""
VOTE_PRIOR = 0.5
"""Votes every label word starts with."""
MIN_SPREAD = 1e-3
"""A layer whose calibrated scores spread less says the same to all rows: what is left of its
scores is rounding, which must not be blown up to count beside a vote."""
BLOCK = 2048
"""Rows compared with the whole task at once: against 50,000 rows in float32 that is 400 MB."""


@dataclass(frozen=True, slots=True)
class Head:
    """scale: [num_layers], above 0; bias: [num_layers, num_labels]; vote_weight: [num_layers]."""

    scale: Array
    bias: Array
    vote_weight: Array

    def scores(self, label_logprobs: NDArray[np.float32], log_vote: Array) -> Array:
        """Scores of rows, [n, num_layers, num_labels] like their log-probabilities.

        log_vote: [n, num_labels], see `log_votes`.
        """
        own = self.scale[:, None] * (label_logprobs - self.bias)
        return own + self.vote_weight[:, None] * log_vote[:, None]

    def label_bias(self, layer: int, log_vote: Array) -> Array:
        """[num_labels] to add to the label words' logits after `layer` (1..num_layers).

        log_vote: [num_labels], see `log_votes`.
        """
        at = layer - 1
        return self.vote_weight[at] / self.scale[at] * log_vote - self.bias[at]


def plain(num_layers: int, num_labels: int) -> Head:
    return Head(np.ones(num_layers), np.zeros((num_layers, num_labels)), np.zeros(num_layers))


def calibrated(label_logprobs: NDArray[np.float32]) -> Head:
    """From the log-probabilities of a task's rows, [n, num_layers, num_labels]."""
    bias, _ = bias_and_spread(label_logprobs)
    return Head(np.ones(len(bias)), bias, np.zeros(len(bias)))


def fused(label_logprobs: NDArray[np.float32], vote_weight: float) -> Head:
    """From the log-probabilities of a task's rows, [n, num_layers, num_labels]."""
    bias, spread = bias_and_spread(label_logprobs)
    return Head(1 / spread, bias, np.full(len(bias), vote_weight))


def bias_and_spread(label_logprobs: NDArray[np.float32]) -> tuple[Array, Array]:
    """[num_layers, num_labels] means, and [num_layers] deviations from them, MIN_SPREAD or more."""
    logprobs = label_logprobs.astype(np.float64)
    bias = logprobs.mean(axis=0)
    return bias, np.maximum((logprobs - bias).std(axis=(0, 2)), MIN_SPREAD)


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


class LeaveOneOutVotes:
    """What its nearest other rows vote on each row of a task, or of a part of it.

    vectors: [n, dimension], L2-normalised, of the rows that vote; labels: [n] label indices.
    nearest, similarities: [b, max_k] of the rows voted on: which rows, nearest first.
    """

    def __init__(
        self,
        vectors: NDArray[np.float32],
        labels: NDArray[np.int32],
        num_labels: int,
        max_k: int,
        on: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None,
    ) -> None:
        """max_k: the most neighbours that will be asked for; fewer where there are fewer rows.

        on: [b, dimension] vectors of the rows voted on, and which of those that vote each is, [b],
        or -1; by default all that vote.
        """
        on = on or (vectors, np.arange(len(vectors)))
        self._labels = labels
        self._counts = label_counts(labels, num_labels)
        found = list(nearest_others(*on, vectors, min(max_k, len(vectors) - 1)))
        self.nearest = np.concatenate([rows for rows, _ in found])
        self.similarities = np.concatenate([values for _, values in found])
        self._log_votes: dict[int, Array] = {}

    def log_votes(self, k: int) -> Array:
        """[b, num_labels]: `log_votes` of the k nearest; a row without others: uniform."""
        if k not in self._log_votes:
            self._log_votes[k] = self._counted(k)
        return self._log_votes[k]

    def _counted(self, k: int) -> Array:
        num_labels, (n, found) = len(self._counts), self.nearest.shape
        if not found:
            return np.full((n, num_labels), -np.log(num_labels))
        similarities = self.similarities[:, :k].astype(np.float64)
        return log_votes(similarities, self._labels[self.nearest[:, :k]], self._counts)


def nearest_others(
    vectors: NDArray[np.float32],
    own: NDArray[np.int64],
    among: NDArray[np.float32],
    k: int,
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """For blocks of rows, in order: which k of `among` are nearest to each, nearest first, and
    their similarities. own: [len(vectors)] which of `among` each row itself is, or -1."""
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK] @ among.T
        at = own[start : start + BLOCK]
        rows = np.flatnonzero(at >= 0)
        block[rows, at[rows]] = -np.inf
        # The upper end: several times faster than the lower end of the negatives.
        nearest = np.argpartition(block, len(among) - max(k, 1), axis=1)[:, len(among) - k :]
        similarities = np.take_along_axis(block, nearest, axis=1)
        order = np.argsort(-similarities, axis=1, kind="stable")
        yield (
            np.take_along_axis(nearest, order, axis=1).astype(np.int32),
            np.take_along_axis(similarities, order, axis=1),
        )
