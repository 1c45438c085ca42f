"""What a look-up needs of one task's rows, made from the table when it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from raee_serve.records import EXIT_HEADS
from raee_serve.retrieval.aggregate import (
    DEFAULT_FRACTION,
    DEFAULT_FREE_TEXT_RULE,
    DEFAULT_LABEL_RULE,
    DEFAULT_VOTE_WEIGHT,
    QUALITY,
    QUALITY_RULE,
    Rule,
    rule_named,
)
from raee_serve.retrieval.heads import (
    VOTE_K,
    Head,
    HeadName,
    LeaveOneOutVotes,
    calibrated,
    fused,
    nearest_others,
)
from raee_serve.retrieval.stacking import stacked
from raee_serve.retrieval.trust import believed, trust_in
from raee_serve.table.evidence import evidence_of, free_text_quality, label_evidence
from raee_serve.table.schema import RuleChoice, TableMetadata, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable

HEADS: tuple[HeadName, ...] = ("plain", "calibrated", "fused", "stacked")
"""The order in which a row's exit information is held. Of free text, which has none of the others,
the first is followed by how well exits do, for each of EXIT_HEADS, as far as rows are believed."""
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
ALL_VOTE = 50_000
VOTERS = 16_384
"""In a task of more than ALL_VOTE rows so many of them, drawn once, vote on table rows, and heads
are made from these: to compare each of a million rows with each other takes hours, with these
minutes. Votes of a sample are from farther away, so exits look a little less able than they are."""
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
    evidence: [n, len(HEADS), num_layers] float32, see `aggregate` and HEADS.
    labels: [n] int32, gold label of each row; 0 for free text.
    distance_bound: mean cosine distance beyond which the nearest rows say nothing.
    choice: how exits are chosen unless a look-up says otherwise.
    heads: those that bias label words, by name; empty for free text.
    """

    ids: list[str]
    vectors: NDArray[np.float32] | None
    keys: NDArray[np.uint64]
    evidence: NDArray[np.float32]
    labels: NDArray[np.int32]
    distance_bound: float
    choice: RuleChoice
    heads: Mapping[HeadName, Head]

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
    quality: float | None,
) -> TaskIndex:
    """What a task of at least one row needs; the arguments are those of `ExitRetriever.open`.

    Raises TableError for unusable rows.

    Without vectors a million rows of two label words and 18 layers take 400 MB, and half a GB more
    while they are loaded; their vectors would be 1.5 GB.
    """
    entry = table.metadata.tasks[name]
    choice = _choice(table, entry, fraction, vote_weight, quality)
    rows = table.rows(name, vectors=keep_vectors)
    blocks = partial(_slices, rows.vectors) if keep_vectors else partial(table.vectors, name)
    drawn = _draw(blocks(AT_ONCE), len(rows))
    evidence = np.zeros((len(rows), len(HEADS), table.metadata.backbone.num_layers), np.float32)
    evidence[:, 0] = evidence_of(rows, entry, evidence.shape[2])
    heads: Mapping[HeadName, Head] = {}
    if entry.kind == "labels":
        heads = _hear_heads(evidence, rows, entry, drawn, blocks, choice.vote_weight)
    else:
        by_exit = free_text_quality(rows, entry, evidence.shape[2])
        evidence[:, 1 : 1 + len(EXIT_HEADS)] = believed(
            by_exit, _trust(by_exit, drawn, quality_neighbours(choice))
        )
    return TaskIndex(
        rows.ids,
        rows.vectors if keep_vectors else None,
        np.empty(0, np.uint64) if keep_vectors else table.keys(name),
        evidence,
        np.zeros(len(rows), np.int32) if rows.golds is None else rows.golds,
        _distance_bound(blocks(AT_ONCE), drawn) if max_distance is None else max_distance,
        choice,
        heads,
    )


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Rows that stand for a task: all, or of a large one some.

    positions: [m], ascending; vectors: [m, dimension].
    """

    positions: NDArray[np.int64]
    vectors: NDArray[np.float32]


def _draw(blocks: Blocks, num_rows: int) -> _Drawn:
    positions = np.arange(num_rows)
    if num_rows > ALL_VOTE:
        positions = np.sort(np.random.default_rng(0).choice(num_rows, VOTERS, replace=False))
    parts = []
    for first, block in _numbered(blocks):
        begin, end = np.searchsorted(positions, [first, first + len(block)])
        parts.append(block[positions[begin:end] - first])
    return _Drawn(positions, np.concatenate(parts))


def _hear_heads(
    evidence: NDArray[np.float32],
    rows: TaskRows,
    entry: TaskEntry,
    drawn: _Drawn,
    blocks: Callable[[int], Blocks],
    vote_weight: float,
) -> dict[HeadName, Head]:
    """The heads that bias label words; fills in what rows say under them, evidence[:, 1:]."""
    golds, logprobs = rows.golds, rows.label_logprobs
    assert golds is not None and logprobs is not None
    some, most = drawn.positions, max(VOTE_K.values())
    ballot = partial(LeaveOneOutVotes, drawn.vectors, golds[some], len(entry.label_words), most)
    votes = ballot()
    heads = _biasing_heads(logprobs[some], golds[some], votes, vote_weight)
    everyone = [(slice(None), votes)]
    is_part = len(some) < len(rows)
    for part, own in _ballots(ballot, blocks(AT_ONCE), some) if is_part else everyone:
        for position, name in enumerate(HEADS[1:], 1):
            scores = heads[name].scores(logprobs[part], own.log_votes(VOTE_K.get(name, 1)))
            evidence[part, position] = label_evidence(scores, golds[part])
    return heads


def _biasing_heads(
    logprobs: NDArray[np.float32],
    golds: NDArray[np.int32],
    votes: LeaveOneOutVotes,
    vote_weight: float,
) -> dict[HeadName, Head]:
    """HEADS without the first, from rows' log-probabilities, [n, num_layers, num_labels]."""
    return {
        "calibrated": calibrated(logprobs),
        "fused": fused(logprobs, vote_weight),
        "stacked": stacked(logprobs, golds, votes.log_votes(VOTE_K["stacked"])),
    }


def _trust(quality: NDArray[np.float32], drawn: _Drawn, k: int) -> float:
    """Of a free-text task's quality of rows in its neighbours; none in a lone row's."""
    some = quality[drawn.positions]
    others = min(k, len(some) - 1)
    if others == 0:
        return 0.0
    own = np.arange(len(some))
    return trust_in(some, nearest_others(drawn.vectors, own, drawn.vectors, others))


def _ballots(
    ballot: Callable[..., LeaveOneOutVotes], blocks: Blocks, voters: NDArray[np.int64]
) -> Iterator[tuple[slice, LeaveOneOutVotes]]:
    """Votes on all rows, block by block. voters: ascending positions of those that vote."""
    for first, block in _numbered(blocks):
        positions = np.arange(first, first + len(block))
        at = np.minimum(np.searchsorted(voters, positions), len(voters) - 1)
        own = np.where(voters[at] == positions, at, -1)
        yield slice(first, first + len(block)), ballot(on=(block, own))


def _choice(
    table: ExitTable,
    entry: TaskEntry,
    fraction: float | None,
    vote_weight: float | None,
    quality: float | None,
) -> RuleChoice:
    """What `calibrate` stored, or the default, with what is set for all tasks."""
    choice = choice_of(table.metadata, entry)
    return replace(
        choice,
        fraction=choice.fraction if fraction is None else fraction,
        vote_weight=choice.vote_weight if vote_weight is None else vote_weight,
        quality=choice.quality if quality is None else quality,
    )


def read_by(rule: Rule, *, biases_labels: bool) -> dict[str, int]:
    """The heads that a rule chooses among on a task's rows, and where in their evidence each is."""
    if rule is QUALITY_RULE:
        return {head: 1 + place for place, head in enumerate(EXIT_HEADS)}
    if not biases_labels:
        return {"plain": 0}
    return {name: place for place, name in enumerate(HEADS) if name in rule.heads}


def choice_of(metadata: TableMetadata, entry: TaskEntry) -> RuleChoice:
    """How exits of a task are chosen if nothing else is asked for: as `calibrate` stored it, or by
    the default."""
    if entry.name in metadata.choices:
        return metadata.choices[entry.name]
    rule = DEFAULT_LABEL_RULE if entry.kind == "labels" else DEFAULT_FREE_TEXT_RULE
    return RuleChoice(rule, rule_named(rule).k, DEFAULT_FRACTION, DEFAULT_VOTE_WEIGHT)


def quality_neighbours(choice: RuleChoice) -> int:
    """How many neighbours rule `quality` asks where a look-up does not say; of so many is the
    trust in them."""
    return choice.k if choice.rule == QUALITY else QUALITY_RULE.k


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
