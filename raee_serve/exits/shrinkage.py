"""How far a free-text task's neighbours are believed when they say how well an exit does.

How well exits do differs between tasks, and between documents of one task mostly by chance.
Without shrinkage, taking the shallowest good exit of a dozen neighbours selects exits that were
good by luck. So each row's quality is shrunk towards the task's average, more strongly when the
table's rows predict each other poorly (empirical Bayes).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from raee_serve.exits.neighbours import evidence_weights
from raee_serve.exits.rule import expected

Neighbours = Iterable[tuple[NDArray[np.int32], NDArray[np.float32]]]
"""Blocks of rows, in order: which rows are nearest to each, and their similarities."""


def trust_in(quality: NDArray[np.float32], neighbours: Neighbours) -> float:
    """Share, 0..1, of the neighbours' deviation from the average that a task's rows bear out.

    The slope of the regression of each row's own deviations on its neighbours', over all exits,
    less its standard error. quality: [n, num_heads, num_layers], n at least 2.
    """
    deviations = (quality - _average(quality)).astype(np.float64)
    told = np.concatenate(
        [expected(deviations[rows], evidence_weights(close)) for rows, close in neighbours]
    )
    by_row = (deviations * told).sum(axis=(1, 2))
    spread = float((told**2).sum(axis=(1, 2)).mean())
    if spread == 0:
        return 0.0
    error = by_row.std(ddof=1) / np.sqrt(len(by_row))
    return float(np.clip((by_row.mean() - error) / spread, 0, 1))


def shrunk(quality: NDArray[np.float32], trust: float) -> NDArray[np.float32]:
    """[n, num_heads, num_layers] quality of rows, drawn towards the average of the task's exits.

    Full depth's own stays; trust 1 changes nothing, with 0 every row says what the task does.
    """
    average = _average(quality)
    return (average + trust * (quality - average)).astype(np.float32)


def kept_quality(quality: NDArray[np.float32]) -> NDArray[np.float64]:
    """[n, heads, num_layers] quality of rows -> [heads, num_layers] of full depth's that each exit
    keeps on all of them; 0 where full depth has none."""
    sums = quality.sum(axis=0, dtype=np.float64)
    full = sums[0, -1]
    return sums / full if full > 0 else np.zeros_like(sums)


def _average(quality: NDArray[np.float32]) -> NDArray[np.float64]:
    """[n, num_heads, num_layers]: each row's full depth times what exits keep of the task's."""
    return quality[:, :1, -1:] * kept_quality(quality)
