"""The states that probes are fitted to, in LanceDB tables of their own beside the rows.

A row's states follow from its text, its task and the backbone, all of which its id and shelf stand
for: they never change, so they are only ever appended, and no version of the exit table has to
hold them. Each shelf has a table, which goes as a whole. Serving reads none.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raee_serve.errors import TableError
from raee_serve.table.commit import CONFLICT, patiently

PREFIX = "states."
IN_MEMORY_BYTES = 2**30
"""States of a task up to this size are held in memory while they are fitted to, in float16; more
go to a scratch file: 10,000 rows of 32 layers of 4,096 are 2.6 GB."""
AT_ONCE = 1024

States = NDArray[np.float16]
"""[layers, n, hidden_size]; a memory-mapped file where it is large."""


class StateStore:
    """database: a LanceDB connection, of which tables are listed, opened, created and dropped."""

    def __init__(self, database: Any) -> None:
        self._database = database

    def add(self, shelf: str, ids: Sequence[str], states: NDArray[np.float16]) -> None:
        """states: [n, layers, hidden_size]."""
        width = int(np.prod(states.shape[1:]))
        schema = pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("layers", pa.int32(), nullable=False),
                pa.field("states", pa.list_(pa.float16()), nullable=False),
            ]
        )
        flat = pa.array(np.ascontiguousarray(states).ravel(), pa.float16())
        offsets = np.arange(len(ids) + 1, dtype=np.int32) * width
        rows = pa.Table.from_arrays(
            [
                pa.array(list(ids)),
                pa.array(np.full(len(ids), states.shape[1], np.int32)),
                pa.ListArray.from_arrays(offsets, flat),
            ],
            schema=schema,
        )
        table = self._opened(shelf) or self._created(shelf, schema)
        patiently(table, lambda: table.add(rows))

    def read(self, shelf: str, ids: Sequence[str]) -> States:
        """Of these rows, in this order. Raises TableError if some are not there."""
        places = {row_id: place for place, row_id in enumerate(ids)}
        found: States | None = None
        seen = np.zeros(len(ids), bool)
        for batch in self._batches(shelf, ["id", "layers", "states"]):
            layers = int(batch["layers"][0].as_py())
            own = [places.get(row_id, -1) for row_id in batch["id"].to_pylist()]
            here = np.array([place >= 0 for place in own])
            values = batch["states"].flatten().to_numpy(zero_copy_only=False)
            values = values.reshape(len(own), layers, -1)
            if found is None:
                found = _space(layers, len(ids), values.shape[2])
            at = np.array(own)[here]
            found[:, at] = values[here].transpose(1, 0, 2)
            seen[at] = True
        if found is None or not seen.all():
            raise TableError(
                f"the states of {int((~seen).sum())} of {len(ids)} rows are gone, so that no "
                "probes can be fitted; build the task once more, which makes them again"
            )
        return found

    def ids(self, shelf: str) -> set[str]:
        """Of the rows whose states are there."""
        return {own for batch in self._batches(shelf, ["id"]) for own in batch["id"].to_pylist()}

    def shelves(self) -> set[str]:
        """All that have states."""
        names = self._database.list_tables().tables
        return {_shelf(name) for name in names if name.startswith(PREFIX)}

    def forget(self, shelves: Iterable[str], untouched_for: timedelta) -> None:
        """Removes the states of these shelves, where none was added for so long: a replacement may
        be under way, whose rows come after their states."""
        for shelf in shelves:
            table = self._opened(shelf)
            if table is None:
                continue
            latest = table.list_versions()[-1]["timestamp"].timestamp()
            if time.time() - latest >= untouched_for.total_seconds():
                self._database.drop_table(_name(shelf), ignore_missing=True)

    def _batches(self, shelf: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        table = self._opened(shelf)
        if table is not None:
            batches = table.search().select(columns).to_batches(AT_ONCE)
            yield from (batch for batch in batches if len(batch))

    def _created(self, shelf: str, schema: pa.Schema) -> Any:
        """A shelf's table, which another writer may make at the same time.

        Of two that LanceDB makes at once the later takes the earlier's place: its rows are added.
        """
        try:
            table = self._database.create_table(_name(shelf), schema=schema)
        except (ValueError, RuntimeError) as e:
            if not ("already exists" in str(e) or CONFLICT.search(str(e))):
                raise
            return self._database.open_table(_name(shelf))
        if (earlier := int(table.version) - 1) > 0:
            table.checkout(earlier)
            rows = table.to_arrow()
            table.checkout_latest()
            patiently(table, lambda: table.add(rows))
        return table

    def _opened(self, shelf: str) -> Any:
        """A shelf's table; None if it was never made, or its creation was cut short."""
        try:
            return self._database.open_table(_name(shelf))
        except ValueError as e:
            if "was not found" not in str(e):
                raise
            return None


def _name(shelf: str) -> str:
    """Of its table. No part of a shelf's name holds a dot, and names of tables hold no slash."""
    return PREFIX + shelf.replace("/", ".")


def _shelf(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".", "/")


def _space(layers: int, rows: int, hidden_size: int) -> States:
    shape = (layers, rows, hidden_size)
    if 2 * int(np.prod(shape)) <= IN_MEMORY_BYTES:
        return np.empty(shape, np.float16)
    with tempfile.NamedTemporaryFile(prefix="raee-states-") as scratch:
        return np.memmap(scratch.name, np.float16, "w+", shape=shape)  # lives until it is let go
