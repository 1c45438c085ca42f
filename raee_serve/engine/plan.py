"""Truncation plan: which rows of a step's batch still run at each decoder layer.

A step's token rows are ordered once, requests that go deepest first. Rows then leave from
the end only, so every later layer works on a prefix of the same tensors: no gather between
layers, and everything indexed by row or by request shrinks by narrowing.

In its last layer a request needs the keys and values of all its rows, for later steps read
them, but attention output and MLP only of the rows whose hidden state somebody wants: those
that are sampled or scored. A long prompt wants one row of its last layer.

Of the requests that leave after a layer those with a shortcut stand last, so that their wanted
rows, too, are the end of the tensors they leave from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch


@dataclass(frozen=True)
class Stage:
    """A run of consecutive decoder layers that work on the same rows.

    Layers `first_layer .. end_layer - 1` (0-based) get the first `num_rows` rows, which belong
    to the first `num_requests` requests. Rows whose exit layer is `end_layer` leave after it.

    kept_rows: [num_kept] int64, or `None` when no row is dropped. Set on stages of one layer:
        all rows write keys and values there, only these go on to its attention and MLP.
    query_start_loc: [num_requests + 1] int32, first kept row of each request, then their number.
    max_query_len: the most kept rows of one request.
    num_shortcut: so many of its last rows leave after it through the shortcut of `end_layer`.
    """

    first_layer: int
    end_layer: int
    num_requests: int
    num_rows: int
    query_start_loc: torch.Tensor
    max_query_len: int
    kept_rows: torch.Tensor | None = None
    num_shortcut: int = 0

    @property
    def num_kept(self) -> int:
        return self.num_rows if self.kept_rows is None else len(self.kept_rows)


@dataclass(frozen=True)
class TruncationPlan:
    """The way of one step's `R` requests and `T` token rows through the decoder layers.

    stages: at least one; `end_layer` strictly rises and `num_rows` never grows.
    request_order: [R] int64, batch index of the request at each place of the plan order.
    row_order: [T] int64, batch row at each place of the plan order.
        Both are `None` when the batch already is in plan order.
    row_place: [T] int64, for each batch row its place among the rows that come out of the last
        stage, in plan order; a row nobody wants has the place of one of its request that is
        wanted. `None` when rows come out as they went in.
    """

    num_rows: int
    stages: tuple[Stage, ...]
    request_order: torch.Tensor | None = None
    row_order: torch.Tensor | None = None
    row_place: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """All rows run the same layers whole, in batch order: vLLM's own attention state serves
        every layer."""
        [first, *others] = self.stages
        return not others and first.kept_rows is None and self.row_order is None

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "TruncationPlan":
        """The plan with what indexes other tensors taken by `move` to where these are.

        `query_start_loc` stays: attention wants it on both sides.
        """

        def there(indices: torch.Tensor | None) -> torch.Tensor | None:
            return None if indices is None else move(indices)

        return replace(
            self,
            stages=tuple(replace(s, kept_rows=there(s.kept_rows)) for s in self.stages),
            request_order=there(self.request_order),
            row_order=there(self.row_order),
            row_place=there(self.row_place),
        )


def plan_truncation(
    exit_layers: Sequence[int],
    query_lens: Sequence[int],
    num_layers: int,
    wanted_lens: Sequence[int] | None = None,
    shortcuts: Sequence[bool] | None = None,
) -> TruncationPlan | None:
    """Plan a step, or return `None` when every request runs all layers.

    exit_layers: [R], each in 1..num_layers, in batch order.
    query_lens: [R], token rows each request has in this step, each at least 1.
    wanted_lens: [R], how many of each request's rows, counted from its last, are wanted after
        its last layer; each in 1..query_len. All of them by default.
    shortcuts: [R], whether its wanted rows leave through the shortcut of its exit layer; never at
        full depth. None of them by default.
    Raises `ValueError` for a value out of range or arrays of unequal length.
    """
    wanted = query_lens if wanted_lens is None else wanted_lens
    short = [False] * len(exit_layers) if shortcuts is None else shortcuts
    return _plan(tuple(exit_layers), tuple(query_lens), num_layers, tuple(wanted), tuple(short))


@lru_cache(maxsize=8)
def _plan(
    exit_layers: tuple[int, ...],
    query_lens: tuple[int, ...],
    num_layers: int,
    wanted_lens: tuple[int, ...],
    shortcuts: tuple[bool, ...],
) -> TruncationPlan | None:
    """Kept, for a batch that decodes has the same plan step after step."""
    exits, lens, wanted = (
        np.asarray(own, dtype=np.int64) for own in (exit_layers, query_lens, wanted_lens)
    )
    short = np.asarray(shortcuts, dtype=bool)
    _check(exits, lens, wanted, short, num_layers)
    if exits.min() == num_layers:
        return None
    order = np.lexsort((short, -exits))
    in_order = bool((order[1:] > order[:-1]).all())
    stages = _stages(exits[order], lens[order], wanted[order], short[order])
    num_rows = int(lens.sum())
    if in_order and wanted.sum() == num_rows:
        return TruncationPlan(num_rows, stages)
    place = torch.from_numpy(_row_place(lens, wanted, order))
    if in_order:
        return TruncationPlan(num_rows, stages, row_place=place)
    rows = _ranges(_starts(lens)[order], lens[order])
    return TruncationPlan(
        num_rows, stages, torch.from_numpy(order), torch.from_numpy(rows), row_place=place
    )


def _check(
    exits: np.ndarray, lens: np.ndarray, wanted: np.ndarray, short: np.ndarray, num_layers: int
) -> None:
    shapes = {exits.shape, wanted.shape, short.shape, lens.shape}
    if len(shapes) > 1 or exits.ndim != 1 or exits.size == 0:
        raise ValueError(
            f"{exits.shape} exit layers, {short.shape} heads and {wanted.shape} wanted lengths for "
            f"{lens.shape} requests; one for each"
        )
    if short[exits == num_layers].any():
        raise ValueError(f"a shortcut at full depth; allowed: at exit layers 1..{num_layers - 1}")
    if exits.min() < 1 or exits.max() > num_layers:
        raise ValueError(f"exit layers {exits.tolist()}; allowed: 1..{num_layers}")
    if wanted.min() < 1 or (wanted > lens).any():
        raise ValueError(f"wanted lengths {wanted.tolist()}; allowed: 1..{lens.tolist()}")


def _stages(
    exits: np.ndarray, lens: np.ndarray, wanted: np.ndarray, short: np.ndarray
) -> tuple[Stage, ...]:
    """Stages of requests given in plan order; the shallowest exits end the first ones."""
    stages: list[Stage] = []
    boundaries = [0, *np.unique(exits).tolist()]
    alive = [int(np.searchsorted(-exits, -d, side="right")) for d in boundaries[1:]] + [0]
    for (first, end), (stay, go_on) in zip(pairwise(boundaries), pairwise(alive), strict=True):
        kept = np.concatenate((lens[:go_on], wanted[go_on:stay]))
        drops_rows = not np.array_equal(kept, lens[:stay])
        whole = end - 1 if drops_rows else end
        num_shortcut = int(wanted[go_on:stay][short[go_on:stay]].sum())
        if whole > first:
            stages.append(_stage(first, whole, lens[:stay]))
        if drops_rows:
            stages.append(_stage(whole, end, lens[:stay], kept))
        stages[-1] = replace(stages[-1], num_shortcut=num_shortcut)
    return tuple(stages)


def _stage(first: int, end: int, lens: np.ndarray, kept: np.ndarray | None = None) -> Stage:
    """Layers `first .. end - 1` on requests of `lens` rows, whose last `kept` (or all) go on."""
    queries = lens if kept is None else kept
    starts = np.concatenate((_starts(queries), [queries.sum()]))
    rows = None if kept is None else torch.from_numpy(_ranges(_starts(lens) + lens - kept, kept))
    return Stage(
        first_layer=first,
        end_layer=end,
        num_requests=len(lens),
        num_rows=int(lens.sum()),
        query_start_loc=torch.from_numpy(starts.astype(np.int32)),
        max_query_len=int(queries.max()),
        kept_rows=rows,
    )


def _row_place(lens: np.ndarray, wanted: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`TruncationPlan.row_place` of requests in batch order that run in `order`."""
    first_place = np.empty_like(lens)
    first_place[order] = _starts(wanted[order])
    row_of_request = np.arange(lens.sum()) - np.repeat(_starts(lens), lens)
    unwanted = np.repeat(lens - wanted, lens)
    return np.repeat(first_place, lens) + np.maximum(row_of_request - unwanted, 0)


def _starts(lens: np.ndarray) -> np.ndarray:
    """Where each of several runs of `lens` begins when they stand one after the other."""
    return np.cumsum(lens) - lens


def _ranges(begins: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """`begins[i] .. begins[i] + lens[i] - 1` for each i, one after the other."""
    return np.arange(lens.sum()) + np.repeat(begins - _starts(lens), lens)
