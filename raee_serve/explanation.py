"""Why a look-up chose its exit. Made only when asked for; it never holds a row's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raee_serve.exits.choice import Choice


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A row that was found. distance: cosine, 0..2. label: gold label; None for free text."""

    id: str
    distance: float
    label: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the rule read, and under which settings.

    neighbours: the k nearest rows, nearest first.
    expected: by head that the rule chooses among, what the neighbours' exit information promises
        of each layer from min_layer to full depth.
    choice: k and budget, with what the request asked for.
    max_distance: cosine distance of the nearest row beyond which a prompt is far.
    min_layer: the rule read no layer before this one.
    certainty: of the front end's own answer to a label task, the highest probability that encoder
        and vote give a label; None where there is none.
    """

    neighbours: tuple[Neighbour, ...]
    expected: Mapping[str, Sequence[float]]
    choice: Choice
    max_distance: float
    min_layer: int
    certainty: float | None = None
