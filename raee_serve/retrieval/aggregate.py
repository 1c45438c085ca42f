"""From the neighbours' exit information to an exit layer, in pure NumPy.

Arrays may carry leading batch dimensions, written `...`; k neighbours, nearest or not first:

    evidence   [..., k, num_layers]  probability of the gold answer where that layer answers the
                                     neighbour correctly, else 0; within 0..1
    distances  [..., k]              cosine distance to each neighbour, within 0..2
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import RaeeError

Array = NDArray[np.float64]

DEFAULT_K = 12
"""Neighbours per look-up; published value."""
DEFAULT_RULE = "earliest"
DEFAULT_FRACTION = 0.95
"""Share of the best layer's score that an earlier layer must reach under `earliest`."""

CONFIDENT = 0.9
"""`published` keeps the pairs of a neighbour with at least this probability."""
TOP_PAIRS = 3
"""How many pairs `published` keeps of a neighbour without a confident one."""
MIN_DISTANCE = 1e-4
"""Smaller distances count as this one, well above the noise of float32 similarities, so that the
ratio d_min/d_i neither divides by zero nor ranks neighbours that are all exact matches."""

NO_EVIDENCE = 0
"""What `exit_layers` gives where no neighbour was answered correctly by any layer."""


def decide(
    rule: str, evidence: NDArray, distances: NDArray, *, fraction: float = DEFAULT_FRACTION
) -> int | None:
    """The exit layer (1..num_layers) for one prompt, or None without any evidence.

    evidence: [k, num_layers]; distances: [k]. Raises as `exit_layers`.
    """
    layer = int(exit_layers(rule, evidence, distances, fraction=fraction))
    return None if layer == NO_EVIDENCE else layer


def exit_layers(
    rule: str, evidence: NDArray, distances: NDArray, *, fraction: float = DEFAULT_FRACTION
) -> NDArray[np.int64]:
    """The exit layer of each prompt in the batch: [...], 1..num_layers or NO_EVIDENCE.

    Raises RaeeError for an unknown rule, shapes that do not fit, or a fraction outside (0, 1].
    """
    if rule not in RULES:
        raise RaeeError(f"unknown rule {rule!r}; known rules: {', '.join(RULES)}")
    if not 0 < fraction <= 1:
        raise RaeeError(f"fraction {fraction} is not within (0, 1]")
    if evidence.shape[:-1] != distances.shape or 0 in evidence.shape[-2:]:
        raise RaeeError(f"evidence {evidence.shape} does not fit distances {distances.shape}")
    evidence = evidence.astype(np.float64)
    choose = RULES[rule]
    layers = 1 + choose(evidence, neighbour_weights(distances), fraction)
    return np.where(evidence.any(axis=(-1, -2)), layers, NO_EVIDENCE)


def neighbour_weights(distances: NDArray) -> Array:
    """[..., k] -> [..., k]: nearest distance over own distance, within (0, 1], nearest 1."""
    clipped = np.maximum(distances.astype(np.float64), MIN_DISTANCE)
    return clipped.min(axis=-1, keepdims=True) / clipped


def published(evidence: Array, weights: Array, _fraction: float) -> NDArray[np.int64]:
    """Layer index with the most weighted probability among the neighbours' best pairs.

    Of each neighbour the (layer, p) pairs with p >= CONFIDENT count, or its TOP_PAIRS best if
    there is none; the earliest layer wins ties. The rule of the paper's code (HugeRaabbit/RAEE).
    """
    scores = _weighted_sum(np.where(_kept_pairs(evidence), evidence, 0), weights)
    return scores.argmax(axis=-1)


def earliest(evidence: Array, weights: Array, fraction: float) -> NDArray[np.int64]:
    """Earliest layer index whose weighted probability reaches `fraction` of the best layer's.

    All pairs of all neighbours count.
    """
    scores = _weighted_sum(evidence, weights)
    enough = scores >= fraction * scores.max(axis=-1, keepdims=True)
    return enough.argmax(axis=-1)


def _kept_pairs(evidence: Array) -> NDArray[np.bool_]:
    """[..., k, num_layers]: which pairs `published` counts; among equals the earlier layers."""
    confident = evidence >= CONFIDENT
    best = np.argsort(-evidence, axis=-1, kind="stable")[..., :TOP_PAIRS]
    top = np.zeros_like(confident)
    np.put_along_axis(top, best, True, axis=-1)
    return np.where(confident.any(axis=-1, keepdims=True), confident, top)


def _weighted_sum(values: Array, weights: Array) -> Array:
    """[..., k, num_layers], [..., k] -> [..., num_layers]"""
    return (values * weights[..., None]).sum(axis=-2)


RULES: dict[str, Callable[[Array, Array, float], NDArray[np.int64]]] = {
    "published": published,
    "earliest": earliest,
}
