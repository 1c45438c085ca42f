"""Exit decisions for prompts: embed their key texts, search the table's rows, decide by them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import TableError
from raee_serve.exit_points import checked_points
from raee_serve.exits.fit import TaskFit, probe_set
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.records import ExitDecision, ExitHead
from raee_serve.retrieval.cost import LookupCost
from raee_serve.retrieval.decider import ExitDecider
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.lookup import Lookup, by_candidates
from raee_serve.retrieval.resources import DEFAULT_BACKEND, ROWS_IN_MEMORY_MB
from raee_serve.retrieval.search import IndexedSearch, InMemorySearch, Search
from raee_serve.retrieval.task_index import TaskIndex, load_task
from raee_serve.retrieval.vector_cache import Encodes, VectorCache
from raee_serve.shortcuts import Shortcuts
from raee_serve.table.schema import EncoderIdentity, TableMetadata
from raee_serve.table.store import ExitTable


class KnowsItself(Encodes, Protocol):
    """An encoder that says which one it is, as `Encoder` does."""

    def identity(self) -> EncoderIdentity: ...


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """The probes of a table's tasks, as workers take them. id: a digest of `packed`."""

    id: str
    packed: bytes

    @classmethod
    def of(cls, fits: Mapping[str, TaskFit]) -> ProbeSet | None:
        """None without any fit."""
        made = probe_set(fits)
        return None if made is None else cls(*made)


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
        decider: ExitDecider,
        search: Search,
        fits: Mapping[str, TaskFit | None],
        table_version: int,
        table_state: str,
    ) -> None:
        self.observe: Callable[[LookupCost], None] = lambda _: None
        self.table_version, self.table_state = table_version, table_state
        self.encoder_identity = metadata.encoder
        self.encoder_backend = encoder_backend
        self._encoder = encoder
        self._search = search
        self.searches_index = isinstance(search, IndexedSearch)
        self._decider = decider
        self.choices, self.tasks = decider.choices, decider.tasks
        self.rows_by_task, self.num_layers = decider.rows_by_task, decider.num_layers
        self.num_rows = sum(self.rows_by_task.values())
        self.heads: dict[str, ExitHead] = {
            name: "plain" if fits[name] is None else "probe"
            for name, task in self.tasks.items()
            if task.kind == "labels"
        }
        self.probe_set = ProbeSet.of({name: fit for name, fit in fits.items() if fit is not None})
        ids = {name: metadata.tasks[name].plain_token_ids for name in self.heads}
        self.plain_token_ids = {name: own for name, own in ids.items() if own}

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        backbone: BackboneIdentity,
        encoder: str | KnowsItself | None = None,
        max_distance: float | None = None,
        budget: float | None = None,
        shortcuts: Shortcuts | None = None,
        encoder_backend: str = DEFAULT_BACKEND,
        rows_in_memory_mb: float = ROWS_IN_MEMORY_MB,
        old: ExitRetriever | None = None,
        exit_points: Sequence[int] = (),
    ) -> ExitRetriever:
        """Loads a table and its encoder (`encoder` overrides where that is found, or is it).

        max_distance: mean cosine distance beyond which the nearest rows are far, for all tasks; by
        default each task has its own bound, see FAR_NEIGHBOURS.
        budget: for all tasks; by default what `calibrate` stored, or the default. shortcuts: those
        that the engine has.
        encoder_backend: see `Encoder`. rows_in_memory_mb: see ROWS_IN_MEMORY_MB; a larger table is
        searched through its index.
        old: a retriever whose encoder, with the vectors it remembers, is taken over as it is.
        exit_points: the layers at which exits are decided, see `exit_points`; none for any.
        Raises TableError if the table is missing, corrupt or empty, or large and without an index,
        BindingError if it belongs to another backbone or encoder or to other shortcuts,
        CheckpointError if the encoder is missing.
        """
        table = ExitTable.open(uri)
        metadata = table.metadata
        metadata.check_backbone(backbone, uri)
        metadata.check_shortcuts(shortcuts, uri)
        if old is not None:
            identity, cache = old.encoder_identity, old._encoder
            encoder_backend = old.encoder_backend
        else:
            model = encoder or metadata.encoder.name
            if isinstance(model, str):
                model = Encoder(model, backend=encoder_backend)
            identity, cache = model.identity(), VectorCache(model)
        metadata.check_encoder(identity, uri)
        filled = [name for name in metadata.built if table.count(name)]
        if not filled:
            raise TableError(f"exit table {uri} holds no task whose build has finished")
        in_memory = _fits(table, rows_in_memory_mb)
        indexes = {
            name: load_task(
                table,
                name,
                keep_vectors=in_memory,
                max_distance=max_distance,
                budget=budget,
            )
            for name in filled
        }
        search = _search(table, indexes)
        points: tuple[int, ...] = ()
        if exit_points:
            points = checked_points(exit_points, metadata.backbone.num_layers)
        decider = ExitDecider(metadata, indexes, points)
        fits = {name: index.fit for name, index in indexes.items()}
        about = fits, table.version, table.state
        return cls(cache, encoder_backend, metadata, decider, search, *about)

    def decide(self, lookups: Sequence[Lookup]) -> list[ExitDecision]:
        """One decision per look-up, in order; all key texts are embedded together.

        Full depth where no exit reaches the budget on any row (NO_EXIT; then the text is
        embedded only to explain it), the nearest rows are too far (FAR) or no exit
        does well on any neighbour (NO_EVIDENCE). `lookup_ms` is the time of the whole batch.
        Raises RaeeError for k < 1, a budget outside (0, 1] or an unknown task.
        """
        start = time.perf_counter()
        for lookup in lookups:
            self._decider.check(lookup)
        never_exits = self._decider.never_exits
        asked = [i for i, own in enumerate(lookups) if own.explain or not never_exits(own)]
        cost = LookupCost()
        found = dict(zip(asked, self._looked_up([lookups[i] for i in asked], cost), strict=True))
        self.observe(cost)
        lookup_ms = (time.perf_counter() - start) * 1000
        decisions = [
            found.get(i) or self._decider.no_exit(lookup) for i, lookup in enumerate(lookups)
        ]
        return [replace(decision, lookup_ms=lookup_ms) for decision in decisions]

    def _looked_up(self, lookups: Sequence[Lookup], cost: LookupCost) -> list[ExitDecision]:
        """By the rows nearest to each."""
        if not lookups:
            return []
        vectors = self._encoded(lookups, cost)
        decisions: dict[int, ExitDecision] = {}
        for candidates, members in by_candidates(lookups).items():
            k = max(self._decider.most_neighbours(lookups[i]) for i in members)
            with cost.of("search"):
                found = self._search.nearest(candidates, vectors[members], k)
            with cost.of("aggregate"):
                for i, neighbours in zip(members, found, strict=True):
                    decisions[i] = self._decider.decide(lookups[i], neighbours, vectors[i])
        return [decisions[i] for i in range(len(lookups))]

    def _encoded(self, lookups: Sequence[Lookup], cost: LookupCost) -> NDArray[np.float32]:
        """[len(lookups), dimension] vectors of the key texts."""
        cache = self._encoder
        hits, misses = cache.hits, cache.misses
        with cost.of("encode"):
            vectors = cache.encode([lookup.key_text for lookup in lookups])
        cost.cache_hits, cost.cache_misses = cache.hits - hits, cache.misses - misses
        return vectors


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
