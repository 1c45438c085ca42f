"""How a truncated decode step lies in CUDA graphs: which segments it replays, at which sizes."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WASTE = 1.25
"""Captured sizes are this factor apart or more, so that at most a fifth of a replay is padding
(but for the smallest batches)."""


def captured_sizes(vanilla_sizes: Sequence[int], max_rows: int) -> tuple[int, ...]:
    """The batch sizes to capture, out of those vLLM captures itself: so thin that our graphs take
    less than half of the memory of vLLM's, which has two for each size.

    max_rows: most rows of a decode step, at least 1.
    """
    kept: list[int] = []
    for size in sorted(vanilla_sizes, reverse=True):
        if size <= max_rows and (not kept or size * WASTE <= kept[-1]):
            kept.append(size)
    return tuple(reversed(kept))


@dataclass(frozen=True)
class GraphLayout:
    """The way of one decode step of R requests, a row each, through the captured segments.

    order: [R] int64, batch index of the request at each place; requests that go deepest first.
    alive: for each segment that is replayed, how many of the first places run it; never grows.
    sizes: the captured sizes they are padded to.
    """

    order: np.ndarray
    alive: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def leaving(self) -> tuple[tuple[int, int], ...]:
        """Places (first, end) whose rows leave after each segment."""
        return tuple(zip((*self.alive[1:], 0), self.alive, strict=True))


def lay_out(
    exit_layers: Sequence[int], points: Sequence[int], sizes: Sequence[int]
) -> GraphLayout | None:
    """None where no graphs fit: too many rows, or an exit that is no exit point.

    exit_layers: [R], in batch order; points: in order, full depth last; sizes: in order.
    """
    if not sizes or len(exit_layers) > sizes[-1] or not set(exit_layers) <= set(points):
        return None
    exits = np.asarray(exit_layers, dtype=np.int64)
    order = np.argsort(-exits, kind="stable")
    starts = (0, *points[:-1])
    alive = [int((exits > start).sum()) for start in starts]
    used = tuple(n for n in alive if n)
    return GraphLayout(order, used, tuple(sizes[bisect_left(sizes, n)] for n in used))
