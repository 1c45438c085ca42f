"""How far a free-text task's neighbours are believed when they say what an exit keeps.

What an exit keeps of full depth differs between tasks, and between documents of one task mostly by
chance: believed wholly, a dozen neighbours let a rule that takes the shallowest good exit take what
was good by luck. Each row's quality is therefore drawn towards the task's, as far as the rows'
own neighbours fail to tell it (shrinkage, as in empirical Bayes).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from raee_serve.retrieval.aggregate import all_pairs, neighbour_weights
from raee_serve.table.evidence import kept_quality

Neighbours = Iterable[tuple[NDArray[np.int32], NDArray[np.float32]]]
"""Blocks of rows, in order: which rows are nearest to each, and their similarities."""


def trust_in(quality: NDArray[np.float32], neighbours: Neighbours) -> float:
    """Share, 0..1, of what neighbours say beyond the task's mean that a task's rows bear out.

    The slope of the regression of each row's own deviations on its neighbours', over all exits,
    less its standard error: what could be luck is not believed.

    quality: [n, num_heads, num_layers], n at least 2.
    """
    deviations = (quality - _expected(quality)).astype(np.float64)
    told = np.concatenate([_told(deviations, *block) for block in neighbours])
    by_row = (deviations * told).sum(axis=(1, 2))
    spread = float((told**2).sum(axis=(1, 2)).mean())
    if spread == 0:
        return 0.0
    error = by_row.std(ddof=1) / np.sqrt(len(by_row))
    return float(np.clip((by_row.mean() - error) / spread, 0, 1))


def believed(quality: NDArray[np.float32], trust: float) -> NDArray[np.float32]:
    """[n, num_heads, num_layers] quality of rows, drawn towards what the task's exits keep.

    Full depth's own stays; trust 1 changes nothing, with 0 every row says what the task does.
    """
    expected = _expected(quality)
    return (expected + trust * (quality - expected)).astype(np.float32)


def _expected(quality: NDArray[np.float32]) -> NDArray[np.float64]:
    """[n, num_heads, num_layers]: each row's full depth times what exits keep of the task's."""
    return quality[:, :1, -1:] * kept_quality(quality)


def _told(
    deviations: NDArray[np.float64],
    nearest: NDArray[np.int32],
    similarities: NDArray[np.float32],
) -> NDArray[np.float64]:
    weights = neighbour_weights(1 - similarities)
    return all_pairs(deviations[nearest], weights / weights.sum(axis=-1, keepdims=True))
