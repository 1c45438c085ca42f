"""Exit decisions for prompts: embed their key texts, search the table's rows, aggregate."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import RaeeError, TableError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.aggregate import (
    DEFAULT_FRACTION,
    DEFAULT_FREE_TEXT_RULE,
    DEFAULT_LABEL_RULE,
    DEFAULT_VOTE_WEIGHT,
    decide,
    rule_named,
)
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.heads import (
    VOTE_K,
    Head,
    HeadName,
    LeaveOneOutVotes,
    calibrated,
    fused,
    label_counts,
    log_votes,
)
from raee_serve.retrieval.stacking import stacked
from raee_serve.retrieval.vector_cache import Encodes, VectorCache
from raee_serve.table.evidence import evidence_of, label_evidence
from raee_serve.table.schema import EncoderIdentity, RuleChoice, TableMetadata, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.table.task import Task
from raee_serve.table.tasks import TASKS

FAR_NEIGHBOURS = 12
BOUND_QUANTILE = 0.97
BOUND_SAMPLE = 1000
"""A prompt is far if its FAR_NEIGHBOURS nearest rows are on average farther away than their nearest
other rows are from nearly all (BOUND_QUANTILE) of the task's own rows, judged on up to BOUND_SAMPLE
of them. The nearest row alone tells prompts of other tasks apart less well: some row is near to
almost any text. See benchmarks/far_prompts.py."""
MIN_BOUND = 1e-3
"""A row no farther than this is of the prompt's own text (embedded in another batch it differs by
about 1e-6), which is never far."""


HEADS: tuple[HeadName, ...] = ("plain", "calibrated", "fused", "stacked")
"""The order in which a row's exit information is held."""


class KnowsItself(Encodes, Protocol):
    """An encoder that says which one it is, as `Encoder` does."""

    def identity(self) -> EncoderIdentity: ...


@dataclass(frozen=True, slots=True)
class Lookup:
    """What to look up for one prompt.

    candidates: names of the tasks it may belong to, one or more; rows of all of them are searched.
    key_text: what the prompt says in the template's slot. k, rule: None for the defaults.
    """

    candidates: tuple[str, ...]
    key_text: str
    k: int | None = None
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class TaskIndex:
    """The rows of one task, as a look-up needs them.

    vectors: [n, dimension] float32, L2-normalised.
    evidence: [n, len(HEADS), num_layers] float32, see `aggregate`; for free text the heads after
        the first hold nothing.
    labels: [n] int32, gold label of each row; 0 for free text.
    distance_bound: mean cosine distance beyond which the nearest rows say nothing.
    choice: how exits are chosen unless a look-up says otherwise.
    heads: those that bias label words, by name; empty for free text.
    """

    vectors: NDArray[np.float32]
    evidence: NDArray[np.float32]
    labels: NDArray[np.int32]
    distance_bound: float
    choice: RuleChoice
    heads: Mapping[HeadName, Head]


class ExitRetriever:
    """Decides exits from rows held in memory; the table is not touched after `open`."""

    def __init__(
        self,
        encoder: Encodes,
        metadata: TableMetadata,
        indexes: Mapping[str, TaskIndex],
    ) -> None:
        self._encoder = VectorCache(encoder)
        self._vectors = np.concatenate([index.vectors for index in indexes.values()])
        self._evidence = np.concatenate([index.evidence for index in indexes.values()])
        self._labels = np.concatenate([index.labels for index in indexes.values()])
        self.choices = {name: index.choice for name, index in indexes.items()}
        self._heads = [index.heads for index in indexes.values()]
        self._names = tuple(indexes)
        self._bounds = [index.distance_bound for index in indexes.values()]
        sizes = [len(index.vectors) for index in indexes.values()]
        self._owner = np.repeat(np.arange(len(sizes)), sizes)  # row -> position in _names
        ends = np.cumsum(sizes)
        self._spans = {
            name: slice(end - size, end)
            for name, end, size in zip(indexes, ends, sizes, strict=True)
        }
        self.num_rows = len(self._vectors)
        self.num_layers = metadata.backbone.num_layers
        self.tasks: Mapping[str, Task] = {name: TASKS[name] for name in indexes}
        self.label_token_ids: Mapping[str, tuple[int, ...]] = {
            name: metadata.tasks[name].label_token_ids for name in indexes
        }

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        backbone: BackboneIdentity,
        encoder: str | KnowsItself | None = None,
        max_distance: float | None = None,
        fraction: float | None = None,
        vote_weight: float | None = None,
    ) -> ExitRetriever:
        """Loads a table and its encoder (`encoder` overrides where that is found, or is it).

        max_distance: mean cosine distance beyond which the nearest rows are far, for all tasks; by
        default each task has its own bound, see FAR_NEIGHBOURS.
        fraction, vote_weight: for all tasks; by default what `calibrate` stored, or the defaults.
        Raises TableError if the table is missing, corrupt or empty, BindingError if it belongs to
        another backbone, encoder or prompt template, CheckpointError if the encoder is missing.
        """
        table = ExitTable.open(uri)
        metadata = table.metadata
        metadata.check_backbone(backbone, uri)
        for name in metadata.tasks:
            if name not in TASKS:
                raise TableError(
                    f"exit table {uri} holds an unknown task {name!r}; known: {', '.join(TASKS)}"
                )
            metadata.check_task(TASKS[name], uri)
        model = encoder or metadata.encoder.name
        model = Encoder(model) if isinstance(model, str) else model
        metadata.check_encoder(model.identity(), uri)
        indexes = {
            name: _load_index(table, name, max_distance, fraction, vote_weight)
            for name in metadata.tasks
        }
        filled = {name: index for name, index in indexes.items() if len(index.vectors)}
        if not filled:
            raise TableError(f"exit table {uri} holds no rows; build it first")
        return cls(model, metadata, filled)

    def decide(self, lookups: Sequence[Lookup]) -> list[ExitDecision]:
        """One decision per look-up, in order; all key texts are embedded together.

        Full depth where the nearest rows are too far (FAR) or no neighbour was answered correctly
        (NO_EVIDENCE). `lookup_ms` is the time of the whole batch.
        Raises RaeeError for k < 1, an unknown rule or an unknown task.
        """
        start = time.perf_counter()
        for lookup in lookups:
            self._check(lookup)
        vectors = self._encoder.encode([lookup.key_text for lookup in lookups])
        decisions: dict[int, ExitDecision] = {}
        for candidates, members in _by_candidates(lookups).items():
            rows, distances = self._distances(candidates, vectors[members])
            for i, own_distances in zip(members, distances, strict=True):
                decisions[i] = self._decide_one(lookups[i], rows, own_distances)
        lookup_ms = (time.perf_counter() - start) * 1000
        return [replace(decisions[i], lookup_ms=lookup_ms) for i in range(len(lookups))]

    def _check(self, lookup: Lookup) -> None:
        if lookup.k is not None and lookup.k < 1:
            raise RaeeError(f"k = {lookup.k} is not allowed, it must be at least 1")
        if lookup.rule is not None:
            rule_named(lookup.rule)
        unknown = [name for name in lookup.candidates if name not in self._spans]
        if unknown or not lookup.candidates:
            raise RaeeError(
                f"tasks {lookup.candidates} must be one or more of this table's: "
                f"{', '.join(self._names)}"
            )

    def _distances(
        self, candidates: tuple[str, ...], queries: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All rows of the candidate tasks, [R], and their cosine distances, [len(queries), R]."""
        spans = [self._spans[name] for name in candidates]
        rows = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        similarities = [queries @ self._vectors[span].T for span in spans]
        return rows, np.clip(1 - np.concatenate(similarities, axis=1), 0, 2)

    def _decide_one(
        self, lookup: Lookup, rows: NDArray[np.int64], distances: NDArray[np.float32]
    ) -> ExitDecision:
        """rows, distances: [R], see `_distances`."""
        owner = self._owner[rows[distances.argmin()]]
        choice = _choice_for(lookup, self.choices[self._names[owner]])
        rule = rule_named(choice.rule)
        heads: tuple[HeadName, ...] = rule.heads if self._heads[owner] else ("plain",)
        nearest = _smallest(distances, max(choice.k, FAR_NEIGHBOURS))
        distance = float(distances[nearest[0]])
        found = {"task": self._names[owner], "distance": distance}
        close = distances[nearest[: _far_neighbours(len(rows))]].mean()
        if distance > MIN_BOUND and close > self._bounds[owner]:
            return ExitDecision.full(self.num_layers, Reason.FAR, **found)
        nearest = nearest[: choice.k]
        evidence = self._evidence[rows[nearest]][:, [HEADS.index(head) for head in heads]]
        chosen = decide(rule, evidence, distances[nearest], fraction=choice.fraction)
        if chosen is None:
            return ExitDecision.full(self.num_layers, Reason.NO_EVIDENCE, **found)
        layer, head = chosen[0], heads[chosen[1]]
        bias = self._label_bias(head, layer, owner, rows[nearest], distances[nearest], rows)
        return ExitDecision(layer, self.num_layers, Reason.RETRIEVED, **found, label_bias=bias)

    def _label_bias(
        self,
        name: HeadName,
        layer: int,
        owner: int,
        nearest: NDArray[np.int64],
        distances: NDArray[np.float32],
        searched: NDArray[np.int64],
    ) -> tuple[float, ...]:
        """What a head adds to the label words' logits, as it was made for the nearest row's task.

        nearest, distances: [k] rows and their distances; searched: all rows they are nearest of.
        """
        head = self._heads[owner].get(name)
        if head is None:
            return ()
        counts = label_counts(self._labels[searched], head.bias.shape[1])
        votes = log_votes(1 - distances.astype(np.float64), self._labels[nearest], counts)
        return tuple(head.label_bias(layer, votes).tolist())


def _by_candidates(lookups: Sequence[Lookup]) -> dict[tuple[str, ...], list[int]]:
    """Positions of the look-ups that search the same rows."""
    groups = defaultdict(list)
    for i, lookup in enumerate(lookups):
        groups[lookup.candidates].append(i)
    return groups


def _smallest(distances: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Positions of the k smallest distances (all, if there are fewer), ascending."""
    k = min(k, len(distances))
    within = np.argpartition(distances, k - 1)[:k]
    return within[np.argsort(distances[within], kind="stable")]


def _choice_for(lookup: Lookup, stored: RuleChoice) -> RuleChoice:
    """The task's choice with what the look-up asks for; another rule brings its own k."""
    rule = lookup.rule or stored.rule
    k = stored.k if rule == stored.rule else rule_named(rule).k
    return replace(stored, rule=rule, k=lookup.k or k)


def _load_index(
    table: ExitTable,
    name: str,
    max_distance: float | None,
    fraction: float | None,
    vote_weight: float | None,
) -> TaskIndex:
    rows, entry = table.rows(name), table.metadata.tasks[name]
    choice = table.metadata.choices.get(name) or default_choice(entry)
    choice = replace(
        choice,
        fraction=choice.fraction if fraction is None else fraction,
        vote_weight=choice.vote_weight if vote_weight is None else vote_weight,
    )
    plain = evidence_of(rows, entry, table.metadata.backbone.num_layers)
    evidence = np.zeros((len(rows), len(HEADS), plain.shape[1]), np.float32)
    evidence[:, 0] = plain
    labels = np.zeros(len(rows), np.int32)
    heads: Mapping[HeadName, Head] = {}
    if entry.kind == "labels" and len(rows):
        assert rows.label_logprobs is not None and rows.golds is not None
        labels = rows.golds
        heads, evidence[:, 1:] = _biasing_heads(rows, entry, choice.vote_weight)
    bound = _distance_bound(rows.vectors) if max_distance is None else max_distance
    return TaskIndex(rows.vectors, evidence, labels, bound, choice, heads)


def default_choice(entry: TaskEntry) -> RuleChoice:
    """How exits of a task are chosen if nothing else is stored or asked for."""
    rule = DEFAULT_LABEL_RULE if entry.kind == "labels" else DEFAULT_FREE_TEXT_RULE
    return RuleChoice(rule, rule_named(rule).k, DEFAULT_FRACTION, DEFAULT_VOTE_WEIGHT)


def _biasing_heads(
    rows: TaskRows, entry: TaskEntry, vote_weight: float
) -> tuple[dict[HeadName, Head], NDArray[np.float32]]:
    """HEADS without the first, and the rows' exit information under them, [n, 3, num_layers]."""
    logprobs, golds = rows.label_logprobs, rows.golds
    assert logprobs is not None and golds is not None
    most = max(VOTE_K.values())
    ballot = LeaveOneOutVotes(rows.vectors, golds, len(entry.label_words), most)
    votes = {name: ballot.log_votes(VOTE_K.get(name, 1)) for name in HEADS[1:]}
    heads: dict[HeadName, Head] = {
        "calibrated": calibrated(logprobs),
        "fused": fused(logprobs, vote_weight),
        "stacked": stacked(logprobs, golds, votes["stacked"]),
    }
    scores = (heads[name].scores(logprobs, votes[name]) for name in HEADS[1:])
    return heads, np.stack([label_evidence(own, golds) for own in scores], axis=1)


def _distance_bound(vectors: NDArray[np.float32]) -> float:
    """BOUND_QUANTILE of the sampled rows' mean distances to their nearest other rows."""
    if len(vectors) < 2:
        return MIN_BOUND
    sample = np.random.default_rng(0).permutation(len(vectors))[:BOUND_SAMPLE]
    k = _far_neighbours(len(vectors))
    similarities = vectors[sample] @ vectors.T
    similarities[np.arange(len(sample)), sample] = -np.inf
    nearest = -np.partition(-similarities, k - 1, axis=1)[:, :k]
    return max(float(np.quantile(1 - nearest.mean(axis=1), BOUND_QUANTILE)), MIN_BOUND)


def _far_neighbours(num_rows: int) -> int:
    """How many of the nearest of so many rows are judged: as many as each has others."""
    return max(1, min(FAR_NEIGHBOURS, num_rows - 1))
