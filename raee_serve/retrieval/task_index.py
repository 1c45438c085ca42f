"""What a look-up needs of one task's rows, made from the table when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from raee_serve.retrieval.aggregate import (
    DEFAULT_FRACTION,
    DEFAULT_FREE_TEXT_RULE,
    DEFAULT_LABEL_RULE,
    DEFAULT_VOTE_WEIGHT,
    rule_named,
)
from raee_serve.retrieval.heads import Calibration, Head, Voters, voting
from raee_serve.table.evidence import evidence_of, label_evidence
from raee_serve.table.schema import RuleChoice, TaskEntry
from raee_serve.table.store import ExitTable

HEADS: tuple[Head, ...] = ("plain", "calibrated", "fused")
"""The order in which a row's exit information is held."""
BOUND_QUANTILE = 0.99
BOUND_SAMPLE = 1000
"""A prompt is far if its nearest row is farther than the nearest other row is from nearly all
(BOUND_QUANTILE) of the task's own rows, judged on up to BOUND_SAMPLE of them."""
MIN_BOUND = 1e-3
"""Least distance bound: the same text embedded in another batch differs by about 1e-6, so that a
task with a single row still knows its own text."""
AT_ONCE = 16_384
"""Rows read and worked on at once: with 384 dimensions 25 MB of vectors."""


@dataclass(frozen=True, slots=True)
class TaskIndex:
    """The rows of one task, as a look-up needs them.

    vectors: [n, dimension] float32, L2-normalised; None where the table's index is searched.
    keys: [n] uint64, under which that index finds the rows; else empty.
    evidence: [n, len(HEADS), num_layers] float32, see `aggregate`; for free text the heads after
        the first hold nothing.
    labels: [n] int32, gold label of each row; 0 for free text.
    distance_bound: cosine distance beyond which the nearest row says nothing.
    choice: how exits are chosen unless a look-up says otherwise.
    calibration: None for free text.
    """

    vectors: NDArray[np.float32] | None
    keys: NDArray[np.uint64]
    evidence: NDArray[np.float32]
    labels: NDArray[np.int32]
    distance_bound: float
    choice: RuleChoice
    calibration: Calibration | None

    def __len__(self) -> int:
        return len(self.labels)


def load_task(
    table: ExitTable,
    name: str,
    *,
    keep_vectors: bool,
    max_distance: float | None,
    fraction: float | None,
    vote_weight: float | None,
) -> TaskIndex:
    """What a task of at least one row needs; the arguments are those of `ExitRetriever.open`.

    Raises TableError for unusable rows.

    Without vectors a million rows of two label words and 18 layers take 370 MB while they are
    loaded, and 230 MB from then on; their vectors would be 1.5 GB.
    """
    entry = table.metadata.tasks[name]
    choice = _choice(table, entry, fraction, vote_weight)
    rows = table.rows(name, vectors=keep_vectors)
    blocks = partial(_slices, rows.vectors) if keep_vectors else partial(table.vectors, name)
    some = voting(len(rows))
    picked = _picked(blocks(AT_ONCE), some)
    labels, calibration = np.zeros(len(rows), np.int32), None
    evidence = np.zeros((len(rows), len(HEADS), table.metadata.backbone.num_layers), np.float32)
    evidence[:, 0] = evidence_of(rows, entry, evidence.shape[2])
    if entry.kind == "labels":
        assert rows.golds is not None and rows.label_logprobs is not None
        labels, calibration = rows.golds, Calibration.of(rows.label_logprobs)
        voters = Voters(some, picked, labels[some], len(entry.label_words))
        for first, block in _numbered(blocks(AT_ONCE)):
            part = slice(first, first + len(block))
            votes = voters.log_votes_on(block, first)
            for position, head in enumerate(HEADS[1:], 1):
                scores = calibration.scores(
                    head, rows.label_logprobs[part], votes, choice.vote_weight
                )
                evidence[part, position] = label_evidence(scores, labels[part])
    return TaskIndex(
        rows.vectors if keep_vectors else None,
        np.empty(0, np.uint64) if keep_vectors else table.keys(name),
        evidence,
        labels,
        _distance_bound(blocks(AT_ONCE), picked, some) if max_distance is None else max_distance,
        choice,
        calibration,
    )


def _choice(
    table: ExitTable, entry: TaskEntry, fraction: float | None, vote_weight: float | None
) -> RuleChoice:
    """What `calibrate` stored, or the default, with what is set for all tasks."""
    rule = DEFAULT_LABEL_RULE if entry.kind == "labels" else DEFAULT_FREE_TEXT_RULE
    default = RuleChoice(rule, rule_named(rule).k, DEFAULT_FRACTION, DEFAULT_VOTE_WEIGHT)
    choice = table.metadata.choices.get(entry.name, default)
    return replace(
        choice,
        fraction=choice.fraction if fraction is None else fraction,
        vote_weight=choice.vote_weight if vote_weight is None else vote_weight,
    )


Blocks = Iterator[NDArray[np.float32]]
"""A task's vectors, in order, some rows at a time: [rows, dimension]."""


def _slices(vectors: NDArray[np.float32], at_once: int) -> Blocks:
    return (vectors[start : start + at_once] for start in range(0, len(vectors), at_once))


def _numbered(blocks: Blocks) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Blocks with the position of their first row."""
    first = 0
    for block in blocks:
        yield first, block
        first += len(block)


def _picked(blocks: Blocks, positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """[len(positions), dimension]: the vectors at these positions, which ascend."""
    parts = []
    for first, block in _numbered(blocks):
        begin, end = np.searchsorted(positions, [first, first + len(block)])
        parts.append(block[positions[begin:end] - first])
    return np.concatenate(parts)


def _distance_bound(
    blocks: Blocks, picked: NDArray[np.float32], positions: NDArray[np.int64]
) -> float:
    """BOUND_QUANTILE of distances to the nearest other row, of some rows among the picked ones."""
    chosen = np.random.default_rng(0).permutation(len(picked))[:BOUND_SAMPLE]
    sample, own = picked[chosen], positions[chosen]
    nearest = np.full(len(sample), -np.inf)
    for first, block in _numbered(blocks):
        similarities = sample @ block.T
        here = (first <= own) & (own < first + len(block))
        similarities[here, own[here] - first] = -np.inf
        nearest = np.maximum(nearest, similarities.max(axis=1))
    if len(positions) < 2:
        return MIN_BOUND
    return max(float(np.quantile(1 - nearest, BOUND_QUANTILE)), MIN_BOUND)
