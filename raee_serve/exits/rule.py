"""From the neighbours' exit information to an exit, in pure NumPy.

Arrays may carry leading batch dimensions, written `...`; k neighbours:

    evidence   [..., k, num_heads, num_layers]  how well each exit does on the neighbour, in 0..1
    weights    [..., k]                         how much the prompt is like it; they sum to 1
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import RaeeError
from raee_serve.exits.neighbours import Array

NO_EVIDENCE = 0
"""What rules give as the layer where no exit does well on any neighbour."""
CONFIDENT = 0.9
"""`published` keeps the pairs of a neighbour with at least this probability."""
TOP_PAIRS = 3
"""How many pairs `published` keeps of a neighbour without a confident one."""
MIN_DISTANCE = 1e-4
"""Smaller distances count as this one in `published`: well above the noise of float32."""

Exits = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Layers [...], 1..num_layers or NO_EVIDENCE, and heads [...], positions in the evidence."""


def expected(evidence: NDArray, weights: NDArray) -> Array:
    """[..., num_heads, num_layers] how well each exit is expected to do on the prompt."""
    *batch, k, heads, layers = evidence.shape
    flat = evidence.reshape(*batch, k, heads * layers).astype(np.float64)
    return (weights[..., None, :] @ flat).reshape(*batch, heads, layers)


def shallowest(scores: Array, budget: float, points: Sequence[int] = ()) -> Exits:
    """The shallowest exit that reaches `budget` of the best one's expected quality.

    scores: [..., num_heads, num_layers], 0 for exits that nothing is known of. points: the layers
    that may be chosen, num_layers among them; none for any. Of two heads at a layer the better.
    Raises RaeeError for a budget outside (0, 1].
    """
    if not 0 < budget <= 1:
        raise RaeeError(f"budget {budget} is not within (0, 1]")
    by_layer = scores.max(axis=-2)
    best = by_layer.max(axis=-1, keepdims=True)
    reaches = by_layer >= budget * best
    if points:
        places = np.arange(by_layer.shape[-1])
        reaches = reaches & np.isin(places + 1, points)
        reaches[..., -1] |= ~reaches.any(axis=-1)
    layers = reaches.argmax(axis=-1)
    at_layer = np.take_along_axis(scores, layers[..., None, None], axis=-1)[..., 0]
    return np.where(best[..., 0] > 0, 1 + layers, NO_EVIDENCE), at_layer.argmax(axis=-1)


def published(evidence: NDArray, distances: NDArray) -> NDArray[np.int64]:
    """[...] layers, 1..num_layers or NO_EVIDENCE, as the paper's code has it (HugeRaabbit/RAEE).

    evidence: [..., k, num_layers], probability of the gold answer where the plain head gives it,
    else 0; distances: [..., k] cosine. Of each neighbour the confident pairs count, or its
    TOP_PAIRS best, by nearest distance over own distance; the layer with the highest sum is taken.
    """
    clipped = np.maximum(distances.astype(np.float64), MIN_DISTANCE)
    weights = clipped.min(axis=-1, keepdims=True) / clipped
    confident = evidence >= CONFIDENT
    best = np.argsort(-evidence, axis=-1, kind="stable")[..., :TOP_PAIRS]
    top = np.zeros_like(confident)
    np.put_along_axis(top, best, True, axis=-1)
    kept = np.where(confident.any(axis=-1, keepdims=True), confident, top)
    sums = (np.where(kept, evidence, 0) * weights[..., None]).sum(axis=-2)
    return np.where(sums.max(axis=-1) > 0, 1 + sums.argmax(axis=-1), NO_EVIDENCE)
