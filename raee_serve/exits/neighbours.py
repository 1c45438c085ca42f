"""Which rows are nearest to each other, and what they say together, in pure NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

Array = NDArray[np.float64]

VOTERS = 128
"""Neighbours that vote on a label."""
VOTE_TEMPERATURE = 0.1
"""A neighbour less similar by this much has 1/e of the vote."""
VOTE_PRIOR = 0.5
"""Votes every label starts with."""
EVIDENCE_TEMPERATURE = 0.1
"""The same as VOTE_TEMPERATURE, where exit information is averaged and not labels."""
CERTAINTY_SPREAD = 0.05
"""How alike neighbours have to be in certainty: the width of a Gaussian."""
LEAST_WEIGHT = 1e-9
"""So that weights have a sum where no neighbour is alike in certainty."""
BLOCK = 2048
"""Rows compared with all others at once: against 50,000 rows in float32 that is 400 MB."""


def evidence_weights(
    similarities: NDArray, certainties: NDArray | None = None, certainty: NDArray | None = None
) -> Array:
    """Weights of neighbours, [..., k], which sum to 1: how much a prompt is like each of them.

    similarities: [..., k] cosine. certainties: [..., k] of the neighbours and certainty: [...] of
    the prompt itself: the highest probability that encoder and vote, without any layer, give a
    label. A prompt that these answer easily is compared with rows that they answer easily.
    """
    closeness = (similarities - similarities.max(axis=-1, keepdims=True)) / EVIDENCE_TEMPERATURE
    if certainties is not None and certainty is not None:
        apart = (certainties - np.asarray(certainty)[..., None]) / CERTAINTY_SPREAD
        closeness = closeness - apart**2 / 2
    weights = np.exp(closeness.astype(np.float64)) + LEAST_WEIGHT
    return weights / weights.sum(axis=-1, keepdims=True)


def log_votes(similarities: NDArray, labels: NDArray[np.int32], counts: NDArray[np.int64]) -> Array:
    """[..., num_labels] log of the share of the neighbours' votes for each label.

    similarities: [..., k] cosine of the neighbours; labels: [..., k] their gold labels.
    counts: [num_labels] rows with each label among those searched; votes are divided by them, so
        that a frequent label is not voted for because it is frequent.
    """
    values = similarities.astype(np.float64)
    weights = np.exp((values - values.max(axis=-1, keepdims=True)) / VOTE_TEMPERATURE)
    shape, num_labels = weights.shape[:-1], len(counts)
    offsets = np.arange(int(np.prod(shape, dtype=int))) * num_labels
    places = labels.reshape(len(offsets), -1) + offsets[:, None]
    cast = np.bincount(places.ravel(), weights.ravel(), len(offsets) * num_labels)
    cast = cast.reshape(*shape, num_labels)
    balanced = cast * counts.mean() / np.maximum(counts, 1) + VOTE_PRIOR
    return np.log(balanced / balanced.sum(axis=-1, keepdims=True))


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


@threadpool_limits.wrap(limits=1, user_api="blas")  # see `fit.fit_task`
def neighbour_votes(
    queries: NDArray[np.float32],
    own: NDArray[np.int64],
    vectors: NDArray[np.float32],
    golds: NDArray[np.int32],
    num_labels: int,
) -> Array:
    """[len(queries), num_labels] log of the votes of the VOTERS nearest rows.

    own: [len(queries)] which row each query itself is, or -1. vectors, golds: of the rows.
    """
    counts = np.bincount(golds, minlength=num_labels)
    k = min(VOTERS, len(golds) - int((own >= 0).any()))
    found = nearest_others(queries, own, vectors, k)
    return np.concatenate([log_votes(close, golds[near], counts) for near, close in found])
