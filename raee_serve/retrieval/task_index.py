"""What a look-up needs of a task's rows beside their vectors, made when the table is opened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from raee_serve.exits.choice import Choice
from raee_serve.exits.fit import TaskFit
from raee_serve.exits.neighbours import nearest_others
from raee_serve.exits.shrinkage import shrunk, trust_in
from raee_serve.records import EXIT_HEADS, ExitHead
from raee_serve.table.evidence import free_text_quality, most_kept
from raee_serve.table.schema import TableMetadata, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable

FAR_NEIGHBOURS = 12
BOUND_QUANTILE = 0.97
BOUND_SAMPLE = 1000
"""A prompt is far if its FAR_NEIGHBOURS nearest rows are on average farther away than their nearest
other rows are from nearly all (BOUND_QUANTILE) of the task's own rows, judged on up to BOUND_SAMPLE
of them. The nearest row alone tells prompts of other tasks apart less well: some row is near to
almost any text. See benchmarks/far_prompts.py."""
MIN_BOUND = 0.02
"""A row no farther than this is of the prompt's own text, which is never far: 8-bit weights move a
text by up to .015 from where torch put it when the table was built (600 texts of seven tasks)."""
ALL_DRAWN = 50_000
DRAWN = 16_384
"""In a task of more than ALL_DRAWN rows so many of them, drawn once, stand for all."""
AT_ONCE = 16_384
"""Rows read and worked on at once: with 384 dimensions 25 MB of vectors."""

Blocks = Iterator[NDArray[np.float32]]
"""A task's vectors, in order, some rows at a time: [rows, dimension]."""


@dataclass(frozen=True, slots=True)
class TaskIndex:
    """The rows of one task, as a look-up needs them.

    ids: n row ids.
    vectors: [n, dimension] float32, L2-normalised; None where the table's index is searched.
    keys: [n] uint64, under which that index finds the rows; else empty.
    heads: those that exits of the task may have.
    evidence: [n, len(heads), num_layers] float32, exit information; 0 for exits that have none and
        for rows that came after the last fit.
    plain_probs: [n, num_layers], what the paper's rule reads; None where there is none.
    labels: [n] int32, gold label of each row; 0 for free text. counts: [num_labels] rows with each.
    certainties: [n], see `TaskFit`; 0 without a fit.
    distance_bound: mean cosine distance beyond which the nearest rows say nothing.
    choice: how exits are chosen unless a look-up says otherwise.
    fit: of a label task whose rows allow one. most_kept: see `table.evidence`; infinite for labels.
    """

    ids: list[str]
    vectors: NDArray[np.float32] | None
    keys: NDArray[np.uint64]
    heads: tuple[ExitHead, ...]
    evidence: NDArray[np.float32]
    plain_probs: NDArray[np.float32] | None
    labels: NDArray[np.int32]
    counts: NDArray[np.int64]
    certainties: NDArray[np.float32]
    distance_bound: float
    choice: Choice
    fit: TaskFit | None
    most_kept: float

    def __len__(self) -> int:
        return len(self.ids)


def load_task(
    table: ExitTable,
    name: str,
    *,
    keep_vectors: bool,
    max_distance: float | None,
    budget: float | None,
) -> TaskIndex:
    """What a task of at least one row needs; the arguments are those of `ExitRetriever.open`.

    Raises TableError for unusable rows.
    """
    entry, num_layers = table.metadata.tasks[name], table.metadata.backbone.num_layers
    choice = choice_of(table.metadata, entry)
    if budget is not None:
        choice = replace(choice, budget=budget)
    rows = table.rows(name, vectors=keep_vectors)
    blocks = partial(_slices, rows.vectors) if keep_vectors else partial(table.vectors, name)
    drawn = _draw(blocks(AT_ONCE), len(rows))
    fit, limit = table.fit(name), np.inf
    certainties, labels = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int32)
    heads: tuple[ExitHead, ...] = ("plain",)
    evidence = np.zeros((len(rows), 1, num_layers), np.float32)
    if entry.kind == "free-text":
        heads, quality = EXIT_HEADS, free_text_quality(rows, entry, num_layers)
        limit, evidence = most_kept(quality), shrunk(quality, _trust(quality, drawn, choice.k))
    elif fit is not None:
        heads = ("probe",)
        _fill_in(fit, rows, evidence, certainties)
    if rows.golds is not None:
        labels = rows.golds
    return TaskIndex(
        rows.ids,
        rows.vectors if keep_vectors else None,
        np.empty(0, np.uint64) if keep_vectors else table.keys(name),
        heads,
        evidence,
        rows.plain_probs,
        labels,
        np.bincount(labels, minlength=len(entry.labels)),
        certainties,
        _distance_bound(blocks(AT_ONCE), drawn) if max_distance is None else max_distance,
        choice,
        fit,
        limit,
    )


def choice_of(metadata: TableMetadata, entry: TaskEntry) -> Choice:
    """How exits of a task are chosen if nothing else is asked for: as `calibrate` stored it, or by
    the default."""
    return metadata.choices.get(entry.name) or Choice.default(entry.kind)


def _fill_in(
    fit: TaskFit,
    rows: TaskRows,
    evidence: NDArray[np.float32],
    certainties: NDArray[np.float32],
) -> None:
    """What the fit records of the rows, where they are in the table's order."""
    found = fit.places(rows.ids)
    known, at = found >= 0, found[found >= 0]
    evidence[known] = fit.spread(fit.exit_probs[at], evidence.shape[2])
    certainties[known] = fit.certainties[at]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Rows that stand for a task: all, or of a large one some.

    positions: [m], ascending; vectors: [m, dimension].
    """

    positions: NDArray[np.int64]
    vectors: NDArray[np.float32]


def _draw(blocks: Blocks, num_rows: int) -> _Drawn:
    positions = np.arange(num_rows)
    if num_rows > ALL_DRAWN:
        positions = np.sort(np.random.default_rng(0).choice(num_rows, DRAWN, replace=False))
    parts = []
    for first, block in _numbered(blocks):
        begin, end = np.searchsorted(positions, [first, first + len(block)])
        parts.append(block[positions[begin:end] - first])
    return _Drawn(positions, np.concatenate(parts))


def _trust(quality: NDArray[np.float32], drawn: _Drawn, k: int) -> float:
    """Of a free-text task's quality of rows in its neighbours; none in a lone row's."""
    some = quality[drawn.positions]
    others = min(k, len(some) - 1)
    if others == 0:
        return 0.0
    own = np.arange(len(some))
    return trust_in(some, nearest_others(drawn.vectors, own, drawn.vectors, others))


def _slices(vectors: NDArray[np.float32], at_once: int) -> Blocks:
    return (vectors[start : start + at_once] for start in range(0, len(vectors), at_once))


def _numbered(blocks: Blocks) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Blocks with the position of their first row."""
    first = 0
    for block in blocks:
        yield first, block
        first += len(block)


def _distance_bound(blocks: Blocks, drawn: _Drawn) -> float:
    """BOUND_QUANTILE of the mean distances of some drawn rows to their nearest other rows."""
    if len(drawn.positions) < 2:
        return MIN_BOUND
    chosen = np.random.default_rng(0).permutation(len(drawn.positions))[:BOUND_SAMPLE]
    sample, own = drawn.vectors[chosen], drawn.positions[chosen]
    nearest, num_rows = np.empty((len(sample), 0), np.float32), 0
    for first, block in _numbered(blocks):
        similarities = sample @ block.T
        here = (first <= own) & (own < first + len(block))
        similarities[here, own[here] - first] = -np.inf
        nearest = _most_similar(np.concatenate([nearest, similarities], axis=1), FAR_NEIGHBOURS)
        num_rows = first + len(block)
    nearest = _most_similar(nearest, far_neighbours(num_rows))
    return max(float(np.quantile(1 - nearest.mean(axis=1), BOUND_QUANTILE)), MIN_BOUND)


def _most_similar(similarities: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """[n, m] -> [n, k] (or all m): the largest of each row, in no order."""
    k = min(k, similarities.shape[1])
    return -np.partition(-similarities, k - 1, axis=1)[:, :k]


def far_neighbours(num_rows: int) -> int:
    """How many of the nearest of so many rows are judged: as many as each has others."""
    return max(1, min(FAR_NEIGHBOURS, num_rows - 1))
