"""From the neighbours' exit information to an exit, in pure NumPy.

Arrays may carry leading batch dimensions, written `...`; k neighbours, nearest or not first:

    evidence   [..., k, num_heads, num_layers]  probability of the gold answer where that exit
                                                answers the neighbour correctly, else 0; in 0..1.
                                                Rule `quality`: how well the exit does on the
                                                neighbour, the plain head first; in 0..1
    distances  [..., k]                         cosine distance to each neighbour, within 0..2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import RaeeError
from raee_serve.retrieval.heads import VOTE_K, HeadName

Array = NDArray[np.float64]

DEFAULT_LABEL_RULE = "stacked"
DEFAULT_FREE_TEXT_RULE = "quality"
DEFAULT_FRACTION = 0.95
"""Share of the best layer's score that an earlier layer must reach, unless under `published`."""

DEFAULT_VOTE_WEIGHT = 2.0
"""Weight of the neighbours' vote in fused exits."""

CONFIDENT = 0.9
"""`published` keeps the pairs of a neighbour with at least this probability."""
TOP_PAIRS = 3
"""How many pairs `published` keeps of a neighbour without a confident one."""
MIN_DISTANCE = 1e-4
"""Smaller distances count as this one, well above the noise of float32 similarities, so that the
ratio d_min/d_i neither divides by zero nor ranks neighbours that are all exact matches."""

NO_EVIDENCE = 0
"""What `exits` gives as the layer where no neighbour was answered correctly by any exit."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A way to choose an exit.

    heads: those of label words that it chooses among; none for `quality`, which chooses among exit
        heads. k: neighbours per look-up unless asked otherwise.
    score: (evidence, weights) -> [..., num_heads, num_layers].
    choose: (best score of each layer, fraction) -> layer index.
    """

    heads: tuple[HeadName, ...]
    k: int
    score: Callable[[Array, Array], Array]
    choose: Callable[[Array, float], NDArray[np.int64]]


def rule_named(name: str) -> Rule:
    """Raises RaeeError for an unknown one."""
    if name not in EVERY_RULE:
        raise RaeeError(f"unknown rule {name!r}; known rules: {', '.join(EVERY_RULE)}")
    return EVERY_RULE[name]


def share_of(rule: Rule, fraction: float, quality: float) -> float:
    """What the rule takes for its fraction, where both settings are given."""
    return quality if rule is QUALITY_RULE else fraction


def decide(
    rule: Rule,
    evidence: NDArray,
    distances: NDArray,
    *,
    fraction: float = DEFAULT_FRACTION,
    points: Sequence[int] = (),
) -> tuple[int, int] | None:
    """The exit layer (1..num_layers) and head (position in evidence) for one prompt.

    `None` without any evidence. evidence: [k, num_heads, num_layers]; distances: [k]; points and
    what is raised: as in `exits`.
    """
    layer, head = (
        int(part) for part in exits(rule, evidence, distances, fraction=fraction, points=points)
    )
    return None if layer == NO_EVIDENCE else (layer, head)


def exits(
    rule: Rule,
    evidence: NDArray,
    distances: NDArray,
    *,
    fraction: float = DEFAULT_FRACTION,
    points: Sequence[int] = (),
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The exit of each prompt in the batch: layers [...], 1..num_layers or NO_EVIDENCE, and heads.

    The rule chooses a layer by its best head. points: the layers that may be chosen, num_layers
    among them; where the rule wants another, it chooses again from the points after that one,
    and takes full depth when nothing speaks for any of them.
    Raises RaeeError for shapes that do not fit, or a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise RaeeError(f"fraction {fraction} is not within (0, 1]")
    if evidence.shape[:-2] != distances.shape or 0 in evidence.shape[-3:]:
        raise RaeeError(f"evidence {evidence.shape} does not fit distances {distances.shape}")
    scores = exit_scores(rule, evidence, distances)
    best = scores.max(axis=-2)
    layers = rule.choose(best, fraction)
    if points:
        places = np.arange(best.shape[-1])
        allowed = np.isin(places + 1, points) & (places >= layers[..., None])
        best = np.where(allowed, best, -1.0)
        speaks = best.max(axis=-1) > 0
        layers = np.where(speaks, rule.choose(best, fraction), places[-1])
    at_layer = np.take_along_axis(scores, layers[..., None, None], axis=-1)[..., 0]
    found = evidence.any(axis=(-1, -2, -3))
    return np.where(found, 1 + layers, NO_EVIDENCE), at_layer.argmax(axis=-1)


def exit_scores(rule: Rule, evidence: NDArray, distances: NDArray) -> Array:
    """[..., num_heads, num_layers]: the neighbours' evidence, as the rule weighs it."""
    return rule.score(evidence.astype(np.float64), neighbour_weights(distances))


def neighbour_weights(distances: NDArray) -> Array:
    """[..., k] -> [..., k]: nearest distance over own distance, within (0, 1], nearest 1."""
    clipped = np.maximum(distances.astype(np.float64), MIN_DISTANCE)
    return clipped.min(axis=-1, keepdims=True) / clipped


def all_pairs(evidence: Array, weights: Array) -> Array:
    """Weighted probability of each exit over all neighbours."""
    return (evidence * weights[..., None, None]).sum(axis=-3)


def best_pairs(evidence: Array, weights: Array) -> Array:
    """Weighted probability over each neighbour's pairs with p >= CONFIDENT, or TOP_PAIRS best.

    The pairs that the paper's code keeps (HugeRaabbit/RAEE).
    """
    confident = evidence >= CONFIDENT
    best = np.argsort(-evidence, axis=-1, kind="stable")[..., :TOP_PAIRS]
    top = np.zeros_like(confident)
    np.put_along_axis(top, best, True, axis=-1)
    kept = np.where(confident.any(axis=-1, keepdims=True), confident, top)
    return all_pairs(np.where(kept, evidence, 0), weights)


def share_of_full(evidence: Array, weights: Array) -> Array:
    """What each exit is expected to keep of full depth's quality; 0 where full depth has none."""
    sums = all_pairs(evidence, weights)
    full = sums[..., :1, -1:]
    return np.divide(sums, full, out=np.zeros_like(sums), where=full > 0)


def best_layer(scores: Array, _fraction: float) -> NDArray[np.int64]:
    """[..., num_layers] -> [...]: the layer with the highest score, the earliest of equals."""
    return scores.argmax(axis=-1)


def earliest_layer(scores: Array, fraction: float) -> NDArray[np.int64]:
    """[..., num_layers] -> [...]: the earliest layer to reach `fraction` of the highest score."""
    return (scores >= fraction * scores.max(axis=-1, keepdims=True)).argmax(axis=-1)


def earliest_keeping(scores: Array, quality: float) -> NDArray[np.int64]:
    """[..., num_layers] -> [...]: the earliest layer to reach `quality`, else the last."""
    keeps = scores >= quality
    keeps[..., -1] = True
    return keeps.argmax(axis=-1)


RULES: dict[str, Rule] = {
    "published": Rule(("plain",), 12, best_pairs, best_layer),
    "earliest": Rule(("plain",), 12, all_pairs, earliest_layer),
    "calibrated": Rule(("plain", "calibrated"), 24, all_pairs, earliest_layer),
    "fused": Rule(("fused",), VOTE_K["fused"], all_pairs, earliest_layer),
    "stacked": Rule(("stacked",), VOTE_K["stacked"], all_pairs, earliest_layer),
}
"""By name. Free text has no label words to bias: there the last three are `earliest` with their k.
"""
QUALITY = "quality"
QUALITY_RULE = Rule((), 24, share_of_full, earliest_keeping)
"""Of free text alone, with the wanted quality in the place of the fraction. Asked of label words it
leaves them their own rule."""
EVERY_RULE = {**RULES, QUALITY: QUALITY_RULE}
RULE_NAMES = tuple(EVERY_RULE)
