"""The rows nearest to a prompt: exact, from vectors in memory, or through the table's index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raee_serve.table.index import VectorIndex


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The rows found for one query, nearest first.

    rows: [k] positions among all rows, task after task; distances: [k] cosine, within 0..2.
    """

    rows: NDArray[np.int64]
    distances: NDArray[np.float32]


class Search(Protocol):
    """What the retriever knows of vectors."""

    def nearest(
        self, tasks: Sequence[str], queries: NDArray[np.float32], k: int
    ) -> list[Neighbours]:
        """The k rows of these tasks (all, if there are fewer) nearest to each query.

        queries: [n, dimension], L2-normalised.
        """
        ...


class InMemorySearch:
    """Exact: one matrix product for all queries. vectors: [n, dimension] of each task, in order."""

    def __init__(self, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        self._vectors = vectors
        ends = np.cumsum([len(own) for own in vectors.values()])
        self._rows = {
            name: np.arange(end - len(own), end)
            for (name, own), end in zip(vectors.items(), ends, strict=True)
        }

    def nearest(
        self, tasks: Sequence[str], queries: NDArray[np.float32], k: int
    ) -> list[Neighbours]:
        rows = np.concatenate([self._rows[name] for name in tasks])
        similarities = np.concatenate([queries @ self._vectors[name].T for name in tasks], axis=1)
        found = []
        for own in similarities:
            best = largest(own, k)
            found.append(Neighbours(rows[best], np.clip(1 - own[best], 0, 2)))
        return found


class IndexedSearch:
    """Through the index of a table whose vectors are not held. keys: of all rows, task by task."""

    def __init__(self, index: VectorIndex, keys: NDArray[np.uint64]) -> None:
        self._index = index
        self._order = np.argsort(keys)
        self._sorted = keys[self._order]

    def nearest(
        self, tasks: Sequence[str], queries: NDArray[np.float32], k: int
    ) -> list[Neighbours]:
        return [
            Neighbours(self._order[np.searchsorted(self._sorted, keys)], distances)
            for keys, distances in self._index.nearest(tasks, queries, k)
        ]


def largest(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Positions of the k largest values (all, if there are fewer), descending."""
    k = min(k, len(values))
    within = np.argpartition(values, len(values) - k)[-k:]
    return within[np.argsort(-values[within], kind="stable")]
