"""Exit decisions for prompts: embed their key texts, search the table's rows, aggregate."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import RaeeError, TableError
from raee_serve.exit_points import checked_points
from raee_serve.explanation import Explanation, Neighbour
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.records import ExitDecision, ExitHead, Reason
from raee_serve.retrieval.aggregate import (
    QUALITY,
    QUALITY_RULE,
    decide,
    exit_scores,
    rule_named,
    share_of,
)
from raee_serve.retrieval.cost import LookupCost
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.heads import HeadName, label_counts, log_votes
from raee_serve.retrieval.resources import DEFAULT_BACKEND, ROWS_IN_MEMORY_MB
from raee_serve.retrieval.search import IndexedSearch, InMemorySearch, Neighbours, Search
from raee_serve.retrieval.task_index import (
    FAR_NEIGHBOURS,
    MIN_BOUND,
    TaskIndex,
    far_neighbours,
    load_task,
    read_by,
)
from raee_serve.retrieval.vector_cache import Encodes, VectorCache
from raee_serve.shortcuts import Shortcuts
from raee_serve.table.evidence import most_kept
from raee_serve.table.schema import EncoderIdentity, RuleChoice, TableMetadata
from raee_serve.table.store import ExitTable
from raee_serve.table.task import Task
from raee_serve.table.tasks import TASKS

ROUNDING = 1e-5
"""What sums of float32 qualities may be off by, as a share."""


class KnowsItself(Encodes, Protocol):
    """An encoder that says which one it is, as `Encoder` does."""

    def identity(self) -> EncoderIdentity: ...


@dataclass(frozen=True, slots=True)
class Lookup:
    """What to look up for one prompt.

    candidates: names of the tasks it may belong to, one or more; rows of all of them are searched.
    key_text: what the prompt says in the template's slot. k, rule, quality: None for the defaults.
    min_layer: 1..num_layers; the rule reads no layer before it. explain: say why.
    """

    candidates: tuple[str, ...]
    key_text: str
    k: int | None = None
    rule: str | None = None
    min_layer: int = 1
    explain: bool = False
    quality: float | None = None

    @property
    def task(self) -> str | None:
        """The one that the prompt belongs to, None where it may belong to several."""
        return self.candidates[0] if len(self.candidates) == 1 else None


class ExitRetriever:
    """Decides exits from a table's rows.

    Where `search` is in memory the table is not touched after `open`. Otherwise its index is asked,
    at the version that was opened; everything but the vectors is in memory all the same.

    observe: told the cost of each batch, on the thread that calls `decide`.
    """

    def __init__(
        self,
        encoder: VectorCache,
        encoder_backend: str,
        metadata: TableMetadata,
        indexes: Mapping[str, TaskIndex],
        search: Search,
        table_version: int,
        table_state: str,
        exit_points: tuple[int, ...] = (),
    ) -> None:
        self._exit_points = exit_points
        self.observe: Callable[[LookupCost], None] = lambda _: None
        self.table_version, self.table_state = table_version, table_state
        self.encoder_identity = metadata.encoder
        self.encoder_backend = encoder_backend
        self._encoder = encoder
        self._search = search
        self._ids = [row_id for index in indexes.values() for row_id in index.ids]
        self.searches_index = isinstance(search, IndexedSearch)
        self._evidence = np.concatenate([index.evidence for index in indexes.values()])
        self._labels = np.concatenate([index.labels for index in indexes.values()])
        self.choices = {name: index.choice for name, index in indexes.items()}
        self._heads = [index.heads for index in indexes.values()]
        self._names = tuple(indexes)
        by_exit = list(read_by(QUALITY_RULE, biases_labels=False).values())
        self._most_kept = {
            name: most_kept(index.evidence[:, by_exit])
            for name, index in indexes.items()
            if not index.heads
        }
        self._bounds = [index.distance_bound for index in indexes.values()]
        self._ends = np.cumsum([len(index) for index in indexes.values()])
        self._label_counts = {
            name: label_counts(index.labels, len(metadata.tasks[name].label_words))
            for name, index in indexes.items()
        }
        self.num_rows = len(self._labels)
        self.rows_by_task = {name: len(index) for name, index in indexes.items()}
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
        quality: float | None = None,
        shortcuts: Shortcuts | None = None,
        encoder_backend: str = DEFAULT_BACKEND,
        rows_in_memory_mb: float = ROWS_IN_MEMORY_MB,
        old: ExitRetriever | None = None,
        exit_points: Sequence[int] = (),
    ) -> ExitRetriever:
        """Loads a table and its encoder (`encoder` overrides where that is found, or is it).

        max_distance: mean cosine distance beyond which the nearest rows are far, for all tasks; by
        default each task has its own bound, see FAR_NEIGHBOURS.
        fraction, vote_weight, quality: for all tasks; by default what `calibrate` stored, or the
        defaults. shortcuts: those that the engine has.
        encoder_backend: see `Encoder`. rows_in_memory_mb: see ROWS_IN_MEMORY_MB; a larger table is
        searched through its index.
        old: a retriever whose encoder, with the vectors it remembers, is taken over as it is.
        exit_points: the layers at which exits are decided, see `exit_points`; none for any.
        Raises TableError if the table is missing, corrupt or empty, or large and without an index,
        BindingError if it belongs to another backbone, encoder or prompt template or to other
        shortcuts, CheckpointError if the encoder is missing.
        """
        table = ExitTable.open(uri)
        metadata = table.metadata
        metadata.check_backbone(backbone, uri)
        metadata.check_shortcuts(shortcuts, uri)
        for name in metadata.tasks:
            if name not in TASKS:
                raise TableError(
                    f"exit table {uri} holds an unknown task {name!r}; known: {', '.join(TASKS)}"
                )
            metadata.check_task(TASKS[name], uri)
        if old is not None:
            identity, cache = old.encoder_identity, old._encoder
            encoder_backend = old.encoder_backend
        else:
            model = encoder or metadata.encoder.name
            if isinstance(model, str):
                model = Encoder(model, backend=encoder_backend)
            identity, cache = model.identity(), VectorCache(model)
        metadata.check_encoder(identity, uri)
        filled = [name for name in metadata.tasks if table.count(name)]
        if not filled:
            raise TableError(f"exit table {uri} holds no rows; build it first")
        in_memory = _fits(table, rows_in_memory_mb)
        indexes = {
            name: load_task(
                table,
                name,
                keep_vectors=in_memory,
                max_distance=max_distance,
                fraction=fraction,
                vote_weight=vote_weight,
                quality=quality,
            )
            for name in filled
        }
        search = _search(table, indexes)
        points: tuple[int, ...] = ()
        if exit_points:
            points = checked_points(exit_points, metadata.backbone.num_layers)
        about = table.version, table.state, points
        return cls(cache, encoder_backend, metadata, indexes, search, *about)

    def decide(self, lookups: Sequence[Lookup]) -> list[ExitDecision]:
        """One decision per look-up, in order; all key texts are embedded together.

        Full depth where no exit keeps the quality asked for on any row (NO_EXIT; then the text is
        embedded only to explain it), the nearest rows are too far (FAR) or no neighbour was
        answered correctly (NO_EVIDENCE). `lookup_ms` is the time of the whole batch.
        Raises RaeeError for k < 1, a quality outside (0, 1], an unknown rule or an unknown task.
        """
        start = time.perf_counter()
        for lookup in lookups:
            self._check(lookup)
        asked = [i for i, own in enumerate(lookups) if own.explain or not self._never_exits(own)]
        cost = LookupCost()
        found = dict(zip(asked, self._looked_up([lookups[i] for i in asked], cost), strict=True))
        self.observe(cost)
        lookup_ms = (time.perf_counter() - start) * 1000
        decisions = [
            found.get(i) or ExitDecision.full(self.num_layers, Reason.NO_EXIT, task=lookup.task)
            for i, lookup in enumerate(lookups)
        ]
        return [replace(decision, lookup_ms=lookup_ms) for decision in decisions]

    def _looked_up(self, lookups: Sequence[Lookup], cost: LookupCost) -> list[ExitDecision]:
        """By the rows nearest to each."""
        if not lookups:
            return []
        vectors = self._encoded(lookups, cost)
        decisions: dict[int, ExitDecision] = {}
        for candidates, members in _by_candidates(lookups).items():
            k = max(self._most_neighbours(lookups[i]) for i in members)
            with cost.of("search"):
                found = self._search.nearest(candidates, vectors[members], k)
            with cost.of("aggregate"):
                for i, neighbours in zip(members, found, strict=True):
                    decisions[i] = self._decide_one(lookups[i], neighbours)
        return [decisions[i] for i in range(len(lookups))]

    def _never_exits(self, lookup: Lookup) -> bool:
        """Whether no rows, were they the nearest, could lead to an exit before full depth."""
        choices = {name: self._choice_for(lookup, name) for name in lookup.candidates}
        return all(
            choice.rule == QUALITY and choice.quality > self._most_kept[name] * (1 + ROUNDING)
            for name, choice in choices.items()
        )

    def rule_for(self, task: str, asked: str | None) -> str:
        """The rule that chooses a task's exits where that one, or None, is asked for."""
        own = self.choices[task].rule
        if asked is None or (asked == QUALITY and self.tasks[task].kind == "labels"):
            return own
        return asked

    def _check(self, lookup: Lookup) -> None:
        if lookup.k is not None and lookup.k < 1:
            raise RaeeError(f"k = {lookup.k} is not allowed, it must be at least 1")
        if lookup.rule is not None:
            rule_named(lookup.rule)
        if lookup.quality is not None and not 0 < lookup.quality <= 1:
            raise RaeeError(f"quality {lookup.quality} is not within (0, 1]")
        unknown = [name for name in lookup.candidates if name not in self.tasks]
        if unknown or not lookup.candidates:
            raise RaeeError(
                f"tasks {lookup.candidates} must be one or more of this table's: "
                f"{', '.join(self._names)}"
            )

    def _encoded(self, lookups: Sequence[Lookup], cost: LookupCost) -> NDArray[np.float32]:
        """[len(lookups), dimension] vectors of the key texts."""
        cache = self._encoder
        hits, misses = cache.hits, cache.misses
        with cost.of("encode"):
            vectors = cache.encode([lookup.key_text for lookup in lookups])
        cost.cache_hits, cost.cache_misses = cache.hits - hits, cache.misses - misses
        return vectors

    def _most_neighbours(self, lookup: Lookup) -> int:
        """How many it may need: k depends on which task the nearest row is of."""
        most = max(self._choice_for(lookup, name).k for name in lookup.candidates)
        return max(most, FAR_NEIGHBOURS)

    def _is_far(self, owner: int, searched: tuple[str, ...], found: Neighbours) -> bool:
        """Whether the nearest rows say nothing of the prompt; see `FAR_NEIGHBOURS`."""
        judged = far_neighbours(sum(self.rows_by_task[name] for name in searched))
        close = found.distances[:judged].mean()
        return bool(found.distances[0] > MIN_BOUND and close > self._bounds[owner])

    def _decide_one(self, lookup: Lookup, found: Neighbours) -> ExitDecision:
        """found: at least as many as the look-up needs, unless the tasks have fewer."""
        owner = int(np.searchsorted(self._ends, found.rows[0], side="right"))
        choice = self._choice_for(lookup, self._names[owner])
        rule = rule_named(choice.rule)
        places = read_by(rule, biases_labels=bool(self._heads[owner]))
        heads = tuple(places)
        rows, distances = found.rows[: choice.k], found.distances[: choice.k]
        about: dict[str, Any] = {"task": self._names[owner], "distance": float(distances[0])}
        skipped = lookup.min_layer - 1
        evidence = self._evidence[rows][:, list(places.values()), skipped:]
        if lookup.explain:
            about["explanation"] = Explanation(
                self._told(owner, rows, distances),
                dict(zip(heads, exit_scores(rule, evidence, distances).tolist(), strict=True)),
                choice,
                self._bounds[owner],
                lookup.min_layer,
            )
            if self._never_exits(lookup):  # others of these are not looked up
                return ExitDecision.full(self.num_layers, Reason.NO_EXIT, **about)
        if self._is_far(owner, lookup.candidates, found):
            return ExitDecision.full(self.num_layers, Reason.FAR, **about)
        share = share_of(rule, choice.fraction, choice.quality)
        chosen = decide(rule, evidence, distances, fraction=share)
        if chosen is None:
            return ExitDecision.full(self.num_layers, Reason.NO_EVIDENCE, **about)
        wanted = skipped + chosen[0]
        if self._exit_points and wanted not in self._exit_points:
            points = [point - skipped for point in self._exit_points if point > skipped]
            chosen = decide(rule, evidence, distances, fraction=share, points=points)
            assert chosen is not None
            about["decided_layer"] = wanted
        head, layer = heads[chosen[1]], skipped + chosen[0]
        if rule is QUALITY_RULE:
            return ExitDecision(
                layer, self.num_layers, Reason.RETRIEVED, **about, exit_head=cast(ExitHead, head)
            )
        about["head"] = head
        bias = self._label_bias(head, layer, owner, rows, distances, lookup.candidates)
        return ExitDecision(layer, self.num_layers, Reason.RETRIEVED, **about, label_bias=bias)

    def _told(
        self, owner: int, rows: NDArray[np.int64], distances: NDArray[np.float32]
    ) -> tuple[Neighbour, ...]:
        """The rows as an explanation names them; all tasks that are searched share their words."""
        words = self.tasks[self._names[owner]].label_words
        return tuple(
            Neighbour(self._ids[row], distance, words[self._labels[row]] if words else None)
            for row, distance in zip(rows, distances.tolist(), strict=True)
        )

    def _choice_for(self, lookup: Lookup, name: str) -> RuleChoice:
        """A task's choice with what the look-up asks for; another rule brings its own k."""
        stored = self.choices[name]
        rule = self.rule_for(name, lookup.rule)
        k = stored.k if rule == stored.rule else rule_named(rule).k
        quality = stored.quality if lookup.quality is None else lookup.quality
        return replace(stored, rule=rule, k=lookup.k or k, quality=quality)

    def _label_bias(
        self,
        name: str,
        layer: int,
        owner: int,
        nearest: NDArray[np.int64],
        distances: NDArray[np.float32],
        searched: tuple[str, ...],
    ) -> tuple[float, ...]:
        """What a head adds to the label words' logits, as it was made for the nearest row's task.

        nearest, distances: [k] rows and their distances; searched: the tasks they are nearest of,
        whose label words are the same.
        """
        head = self._heads[owner].get(cast(HeadName, name))
        if head is None:
            return ()
        counts = np.sum([self._label_counts[task] for task in searched], axis=0)
        votes = log_votes(1 - distances.astype(np.float64), self._labels[nearest], counts)
        return tuple(head.label_bias(layer, votes).tolist())


def _fits(table: ExitTable, budget_mb: float) -> bool:
    """Whether the table's vectors are to be held in memory. Raises TableError where they are not
    and there is no index to search instead."""
    num_rows = table.count_rows()
    size_mb = num_rows * table.metadata.encoder.dimension * 4 / 2**20
    if size_mb <= budget_mb:
        return True
    if table.index.kind is None:
        raise TableError(
            f"exit table {table.uri}: its {num_rows:,} rows take {size_mb:,.0f} MB, more than "
            f"--rows-in-memory {budget_mb:g}, and it has no index; make one "
            f"(raee-serve table index {table.uri}) or allow {size_mb:.0f} MB"
        )
    return False


def _search(table: ExitTable, indexes: Mapping[str, TaskIndex]) -> Search:
    vectors = {name: index.vectors for name, index in indexes.items() if index.vectors is not None}
    if vectors:
        return InMemorySearch(vectors)
    return IndexedSearch(table.index, np.concatenate([index.keys for index in indexes.values()]))


def _by_candidates(lookups: Sequence[Lookup]) -> dict[tuple[str, ...], list[int]]:
    """Positions of the look-ups that search the same rows."""
    groups = defaultdict(list)
    for i, lookup in enumerate(lookups):
        groups[lookup.candidates].append(i)
    return groups
