"""The vector index of an exit table: built by LanceDB, asked for the rows nearest to a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lancedb.index import Bitmap, HnswSq, IvfFlat, IvfPq
from numpy.typing import NDArray

from raee_serve.errors import TableError
from raee_serve.table.schema import METRIC

KINDS: dict[str, Callable[..., Any]] = {
    "IVF_FLAT": IvfFlat,
    "IVF_HNSW_SQ": HnswSq,
    "IVF_PQ": IvfPq,
}
"""By name, from the most exact to the smallest."""
FLAT_ROWS = 100_000
"""Up to so many rows IVF_FLAT is fast enough and finds nearly all neighbours."""
HNSW_ROWS = 10_000_000
"""Up to so many rows IVF_HNSW_SQ, which takes a quarter of the vectors' size, beyond IVF_PQ."""
PARTITION_ROWS = 4096
"""Rows in a partition of IVF_FLAT and IVF_PQ, on average."""

MIN_PROBES = 20
"""Partitions looked into, at least; more only while a task's rows found are fewer than asked."""
LEAST_EF = 768
"""Candidates that a search through HNSW keeps, at least, and EF_FACTOR for each neighbour asked
for. In dense regions fewer miss neighbours: with 200,000 rows 384 found 98.8% of 12, 192 94%."""
EF_FACTOR = 4
REFINE_FACTOR = 2
"""Rows fetched with their own vectors for each neighbour asked for: compressed vectors only
preselect, and distances are exact."""
PQ_REFINED = 512
"""Rows that IVF_PQ, whose vectors are compressed most, has fetched at least."""
PQ_VALUES = 8
"""Values of a vector that IVF_PQ keeps as one byte."""

COLUMN = "vector"
Found = tuple[NDArray[np.uint64], NDArray[np.float32]]
"""Keys and cosine distances of the rows found for one query, nearest first."""


def kind_for(num_rows: int) -> str:
    """The kind of index that suits a table of that size."""
    if num_rows <= FLAT_ROWS:
        return "IVF_FLAT"
    return "IVF_HNSW_SQ" if num_rows <= HNSW_ROWS else "IVF_PQ"


class VectorIndex:
    """The index of one table's rows, there or not.

    table: LanceDB's. where: condition that selects the rows of some tasks.
    """

    def __init__(self, table: Any, where: Callable[[Sequence[str]], str]) -> None:
        self._table = table
        self._where = where
        self._asked_kind: str | None = None

    def build(self, kind: str, num_rows: int) -> None:
        """Makes or replaces the index. Raises TableError for an unknown kind."""
        if kind not in KINDS:
            raise TableError(f"unknown kind of index {kind!r}; allowed: {', '.join(KINDS)}")
        options = {}
        if kind != "IVF_HNSW_SQ":  # its graphs are best few and large, as LanceDB makes them
            options["num_partitions"] = max(1, num_rows // PARTITION_ROWS)
        if kind == "IVF_PQ":
            width = self._table.schema.field(COLUMN).type.list_size
            options["num_sub_vectors"] = max(1, width // PQ_VALUES)
        config = KINDS[kind](distance_type=METRIC, **options)
        self._table.create_index(COLUMN, config=config, replace=True)
        self._table.create_index("task", config=Bitmap(), replace=True)

    @property
    def kind(self) -> str | None:
        """Of the index there is; None without one."""
        name = self._name()
        return None if name is None else str(self._table.index_stats(name).index_type)

    @property
    def unindexed_rows(self) -> int:
        """Rows, records too, added since the index was built; they are found, but one by one."""
        name = self._name()
        assert name is not None
        return int(self._table.index_stats(name).num_unindexed_rows)

    def nearest(
        self, tasks: Sequence[str], queries: NDArray[np.float32], k: int, *, exact: bool = False
    ) -> list[Found]:
        """For each query, [n, dimension], the k nearest rows of these tasks, if there are as many.

        exact: compare with every row instead of asking the index.
        """
        query = self._table.search(list(queries)).distance_type(METRIC).limit(k)
        query = query.where(self._where(tasks), prefilter=True)
        query = query.select(["_distance"]).with_row_id(True)
        if exact:
            query = query.bypass_vector_index()
        else:
            query = query.minimum_nprobes(MIN_PROBES).maximum_nprobes(0)
            query = query.ef(max(LEAST_EF, EF_FACTOR * k)).refine_factor(self._refine_factor(k))
        found = query.to_arrow()
        keys, distances = found["_rowid"].to_numpy(), found["_distance"].to_numpy()
        if len(queries) == 1:
            return [(keys, np.clip(distances, 0, 2))]
        of = found["query_index"].to_numpy()
        return [(keys[of == i], np.clip(distances[of == i], 0, 2)) for i in range(len(queries))]

    def _refine_factor(self, k: int) -> int:
        if self._asked_kind is None:
            self._asked_kind = self.kind
        if self._asked_kind == "IVF_PQ":
            return max(REFINE_FACTOR, PQ_REFINED // k)
        return REFINE_FACTOR

    def _name(self) -> str | None:
        for config in self._table.list_indices():
            if list(config.columns) == [COLUMN]:
                return str(config.name)
        return None
