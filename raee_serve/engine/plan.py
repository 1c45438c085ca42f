"""Truncation plan: which rows of a step's batch still run at each decoder layer.

A step's token rows are ordered once, requests that go deepest first. Rows then leave from
the end only, so every later layer works on a prefix of the same tensors: no gather between
layers, and everything indexed by row or by request shrinks by narrowing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Stage:
    """A run of consecutive decoder layers that work on the same rows.

    Layers `first_layer .. end_layer - 1` (0-based) run on the first `num_rows` rows, which
    belong to the first `num_requests` requests. Rows whose exit layer is `end_layer` leave
    after it.
    """

    first_layer: int
    end_layer: int
    num_requests: int
    num_rows: int
    max_query_len: int


@dataclass(frozen=True)
class TruncationPlan:
    """The way of one step's `R` requests and `T` token rows through the decoder layers.

    stages: at least one; `end_layer` strictly rises and `num_rows` strictly falls.
    query_start_loc: [R + 1] int32, first row of each request in plan order, then `T`.
    request_order: [R] int64, batch index of the request at each place of the plan order.
    row_order: [T] int64, batch row at each place of the plan order.
    row_place: [T] int64, inverse of `row_order`.
    The three orders are `None` when the batch already is in plan order.
    """

    stages: tuple[Stage, ...]
    query_start_loc: torch.Tensor
    request_order: torch.Tensor | None = None
    row_order: torch.Tensor | None = None
    row_place: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.stages[0].num_rows

    @property
    def is_uniform(self) -> bool:
        """All requests share one exit layer: no row leaves before the others."""
        return len(self.stages) == 1


def plan_truncation(
    exit_layers: Sequence[int], query_lens: Sequence[int], num_layers: int
) -> TruncationPlan | None:
    """Plan a step, or return `None` when every request runs all layers.

    exit_layers: [R], each in 1..num_layers, in batch order.
    query_lens: [R], token rows each request has in this step, each at least 1.
    Raises `ValueError` for an exit layer out of range or arrays of unequal length.
    """
    exits = np.asarray(exit_layers, dtype=np.int64)
    lens = np.asarray(query_lens, dtype=np.int64)
    if exits.shape != lens.shape or exits.ndim != 1 or exits.size == 0:
        raise ValueError(f"{exits.shape} exit layers for {lens.shape} requests; one for each")
    if exits.min() < 1 or exits.max() > num_layers:
        raise ValueError(f"exit layers {exits.tolist()}; allowed: 1..{num_layers}")
    if exits.min() == num_layers:
        return None
    order = np.argsort(-exits, kind="stable")
    in_order = bool((order[1:] > order[:-1]).all())
    starts = np.concatenate(([0], np.cumsum(lens[order])))
    stages = _stages(exits[order], lens[order], starts)
    query_start_loc = torch.from_numpy(starts.astype(np.int32))
    if in_order:
        return TruncationPlan(stages, query_start_loc)
    rows = _rows_in_order(lens, order, starts)
    place = np.empty_like(rows)
    place[rows] = np.arange(rows.size)
    return TruncationPlan(
        stages,
        query_start_loc,
        request_order=torch.from_numpy(order),
        row_order=torch.from_numpy(rows),
        row_place=torch.from_numpy(place),
    )


def _stages(exits: np.ndarray, lens: np.ndarray, starts: np.ndarray) -> tuple[Stage, ...]:
    """Stages of requests given deepest first; shallowest exits end the first stages."""
    stages = []
    first_layer = 0
    longest = np.maximum.accumulate(lens)
    for end_layer in np.unique(exits).tolist():
        alive = int(np.searchsorted(-exits, -end_layer, side="right"))
        stages.append(
            Stage(first_layer, end_layer, alive, int(starts[alive]), int(longest[alive - 1]))
        )
        first_layer = end_layer
    return tuple(stages)


def _rows_in_order(lens: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[T] batch rows, request after request in `order`, rows of one request in sequence."""
    batch_starts = np.concatenate(([0], np.cumsum(lens)[:-1]))
    offsets = batch_starts[order] - starts[:-1]
    return np.arange(starts[-1]) + np.repeat(offsets, lens[order])
