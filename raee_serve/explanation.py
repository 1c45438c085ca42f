"""Why a look-up chose its exit. Made only when asked for; it never holds a row's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raee_serve.table.schema import RuleChoice


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A row that was found. distance: cosine, 0..2. label: gold label word; None for free text."""

    id: str
    distance: float
    label: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the rule read, and under which settings.

    neighbours: the k nearest rows, nearest first.
    scores: for each head that the rule chooses among, the neighbours' evidence as the rule weighs
        it, for each layer from min_layer to full depth.
    choice: rule, k and the rest, with what the request asked for.
    max_distance: cosine distance of the nearest row beyond which a prompt is far.
    min_layer: the rule read no layer before this one.
    """

    neighbours: tuple[Neighbour, ...]
    scores: Mapping[str, Sequence[float]]
    choice: RuleChoice
    max_distance: float
    min_layer: int
