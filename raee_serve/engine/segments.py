"""Depth segments: runs of equally many decoder layers, whose KV blocks a request holds as one.

A request at exit layer d holds blocks in the segments whose first layer it runs. In the last of
them it may fill only the lower layers; what it filled is part of the name under which a block is
kept for reuse, so that nobody reads a layer that was never written.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

MAX_SEGMENTS = 8
"""The most that `auto` takes. Each has block tables and attention metadata of its own to fill."""

AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class Segment:
    """Decoder layers `first_layer .. end_layer - 1` (0-based), segment `index` of `count`."""

    index: int
    count: int
    first_layer: int
    end_layer: int

    def is_reached(self, exit_layer: int) -> bool:
        """Whether a request at `exit_layer` runs any layer of this segment."""
        return exit_layer > self.first_layer

    def fill(self, exit_layer: int) -> int:
        """What a request at `exit_layer` writes here: `index` for all layers, else a number of
        its own for each exit layer within, from `count` up.
        """
        return self.index if exit_layer >= self.end_layer else self.count + exit_layer

    def fills_for(self, exit_layer: int) -> list[int]:
        """The fills that hold all a request at `exit_layer` reads here, the fullest first."""
        least = min(exit_layer, self.end_layer)
        return [self.fill(e) for e in range(self.end_layer, least - 1, -1)]


def segments_of(num_layers: int, count: int) -> tuple[Segment, ...]:
    """`num_layers` layers in `count` segments. Raises `ValueError` unless they divide evenly."""
    if not 1 <= count <= num_layers or num_layers % count:
        raise ValueError(
            f"{count} KV segments for {num_layers} layers; allowed: "
            f"{', '.join(map(str, _divisors(num_layers, range(1, num_layers + 1))))} "
            "(segments have equally many layers)"
        )
    size = num_layers // count
    return tuple(Segment(i, count, i * size, (i + 1) * size) for i in range(count))


def default_count(num_layers: int) -> int:
    """The most segments, up to `MAX_SEGMENTS`, that divide `num_layers`; 1 when none do."""
    return max(_divisors(num_layers, range(1, MAX_SEGMENTS + 1)))


def parse_count(value: object) -> int | Literal["auto"]:
    """A number of segments from an option. Raises `ValueError` for what is neither."""
    text = str(value)
    if text == AUTO:
        return AUTO
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise ValueError(f"KV segments are {value!r}; allowed: {AUTO} or an integer of at least 1")


def _divisors(number: int, candidates: Iterable[int]) -> list[int]:
    return [c for c in candidates if number % c == 0]
