"""Exit tables in LanceDB. With `index`, the only module that imports lancedb.

A table URI is a directory (or an object store's address) holding two LanceDB tables: `exits`, one
row per labelled prompt, and `metadata`, one row of JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raee_serve.errors import RaeeError, TableError
from raee_serve.table.index import VectorIndex
from raee_serve.table.schema import RuleChoice, TableMetadata, TaskEntry, TaskRows, row_schema

EXITS, METADATA = "exits", "metadata"
VECTOR = "vector"
METADATA_SCHEMA = pa.schema([("key", pa.string()), ("json", pa.string())])
METADATA_KEY = "table"
KEEP_OLD_VERSIONS = timedelta(minutes=10)
"""Superseded files younger than this survive compaction, for readers that are just opening."""


class ExitTable:
    """One exit table, open for reading and adding rows."""

    def __init__(self, uri: str, database: Any) -> None:
        self.uri = uri
        with _naming(uri, "cannot read it"):
            self._exits = database.open_table(EXITS)
            self._metadata = database.open_table(METADATA)
            stored = self._metadata.to_arrow().to_pylist()
            if len(stored) != 1:
                raise TableError(f"expected one metadata row, found {len(stored)}")
            self.metadata = TableMetadata.from_json(stored[0]["json"])
            expected = row_schema(self.metadata.encoder.dimension)
            if not self._exits.schema.equals(expected):
                raise TableError(f"columns are\n{self._exits.schema}\nexpected\n{expected}")

    @classmethod
    def open(cls, uri: str) -> ExitTable:
        """An existing table. Raises TableError with the URI if it is missing or corrupt."""
        if _is_local(uri) and not Path(uri).is_dir():  # lancedb would create the directory
            raise TableError(f"exit table {uri}: no such directory")
        with _naming(uri, "cannot open it"):
            database = lancedb.connect(uri)
            missing = {EXITS, METADATA} - set(_table_names(database))
            if missing:
                raise TableError(f"no LanceDB table named {' or '.join(sorted(missing))} in it")
        return cls(uri, database)

    @classmethod
    def open_or_create(cls, uri: str, metadata: TableMetadata) -> ExitTable:
        """The table at `uri`, new and empty if there is none.

        Raises BindingError if an existing one is bound to another backbone or encoder.
        """
        with _naming(uri, "cannot create it"):
            database = lancedb.connect(uri)
            names = _table_names(database)
            if METADATA not in names:  # written last: a creation cut short is simply done again
                if EXITS in names:
                    database.drop_table(EXITS)
                database.create_table(EXITS, schema=row_schema(metadata.encoder.dimension))
                database.create_table(METADATA, data=_metadata_row(metadata))
        table = cls(uri, database)
        table.metadata.check_backbone(metadata.backbone, uri)
        table.metadata.check_encoder(metadata.encoder, uri)
        return table

    def put_task(self, entry: TaskEntry) -> None:
        """Records a task; BindingError if its rows here were built otherwise."""
        self._put_metadata(self.metadata.with_task(entry))

    def put_choice(self, task: str, choice: RuleChoice) -> None:
        """Records how exits of one of its tasks are to be chosen."""
        self._put_metadata(self.metadata.with_choice(task, choice))

    def add(self, task: str, rows: TaskRows) -> None:
        """Appends rows whose id is new, in one atomic commit; others are left as they are."""
        columns = _to_arrow(task, rows, self._exits.schema)
        with _naming(self.uri, "cannot add rows"):
            self._exits.merge_insert("id").when_not_matched_insert_all().execute(columns)

    def compact(self) -> None:
        """Merges the files of many small additions."""
        with _naming(self.uri, "cannot compact it"):
            self._exits.optimize(cleanup_older_than=KEEP_OLD_VERSIONS)

    def row_ids(self, task: str) -> set[str]:
        with _naming(self.uri, "cannot read its row ids"):
            return set(self._select(task, ["id"])["id"].to_pylist())

    def count_rows(self) -> int:
        return int(self._exits.count_rows())

    def size_bytes(self) -> int:
        return int(self._exits.stats()["total_bytes"])

    def rows(self, task: str, *, vectors: bool = True) -> TaskRows:
        """All rows of a task, on demand without their vectors ([0, dimension] then).

        Raises TableError naming what is wrong with them.
        """
        entry = self.metadata.tasks[task]
        columns = None if vectors else [name for name in self._exits.schema.names if name != VECTOR]
        with _naming(self.uri, f"rows of task {task}"):
            return _from_arrow(self._select(task, columns), entry, self.metadata)

    def vectors(self, task: str, at_once: int) -> Iterator[NDArray[np.float32]]:
        """The vectors of a task's rows, in the order of `rows`, up to so many at a time."""
        with _naming(self.uri, f"vectors of task {task}"):
            query = self._exits.search().where(self._where([task])).select([VECTOR])
            for batch in query.to_batches(at_once):
                yield _vectors(pa.Table.from_batches([batch]), self.metadata)

    def keys(self, task: str) -> NDArray[np.uint64]:
        """Under which `index` finds a task's rows, in the order of `rows`."""
        with _naming(self.uri, f"keys of task {task}"):
            query = self._exits.search().where(self._where([task])).select(["id"])
            return query.with_row_id(True).to_arrow()["_rowid"].to_numpy()

    def count(self, task: str) -> int:
        """Rows of a task."""
        with _naming(self.uri, "cannot count its rows"):
            return int(self._exits.count_rows(self._where([task])))

    def count_stray_rows(self) -> int:
        """Rows of no task that the table records."""
        tasks = self._where(list(self.metadata.tasks)) if self.metadata.tasks else "false"
        return int(self._exits.count_rows(f"NOT ({tasks})"))

    @property
    def index(self) -> VectorIndex:
        """Of the rows as they are seen here."""
        return VectorIndex(self._exits, self._where)

    def build_index(self, kind: str) -> None:
        """Makes or replaces the index; kind: of `index.KINDS`."""
        with _naming(self.uri, "cannot index it"):
            self.index.build(kind, self.count_rows())

    def _put_metadata(self, metadata: TableMetadata) -> None:
        self.metadata = metadata
        with _naming(self.uri, "cannot write its metadata"):
            update = self._metadata.merge_insert("key").when_matched_update_all()
            update.execute(_metadata_row(metadata))

    def _select(self, task: str, columns: list[str] | None) -> pa.Table:
        query = self._exits.search().where(self._where([task]))
        return (query.select(columns) if columns else query).to_arrow()

    def _where(self, tasks: Sequence[str]) -> str:
        # Task names come from the registry and hold no quotes.
        return "task IN (" + ", ".join(f"'{task}'" for task in tasks) + ")"


@contextmanager
def _naming(uri: str, what: str) -> Iterator[None]:
    """Turns any failure inside into a TableError that starts with the table's URI."""
    try:
        yield
    except RaeeError as e:
        raise type(e)(f"exit table {uri}: {what}: {e}") from e
    except Exception as e:  # lancedb raises RuntimeError, OSError, ValueError and its own kinds
        raise TableError(f"exit table {uri}: {what}: {type(e).__name__}: {e}") from e


def _is_local(uri: str) -> bool:
    return "://" not in uri


def _table_names(database: Any) -> list[str]:
    return list(database.list_tables().tables)


def _metadata_row(metadata: TableMetadata) -> pa.Table:
    row = {"key": METADATA_KEY, "json": metadata.to_json()}
    return pa.Table.from_pylist([row], schema=METADATA_SCHEMA)


def _to_arrow(task: str, rows: TaskRows, schema: pa.Schema) -> pa.Table:
    n = len(rows)
    dimension = schema.field("vector").type.list_size
    assert rows.vectors.shape == (n, dimension), f"{rows.vectors.shape} is not [{n}, {dimension}]"
    vectors = pa.FixedSizeListArray.from_arrays(rows.vectors.astype(np.float32).ravel(), dimension)
    columns = [
        rows.ids,
        [task] * n,
        vectors,
        None if rows.golds is None else rows.golds.astype(np.int32),
        _flat_rows(rows.label_logprobs),
        _flat_rows(rows.reference_logprob),
        _flat_rows(rows.agreement),
        rows.texts,
    ]
    arrays = [
        pa.nulls(n, field.type) if column is None else pa.array(column, field.type)
        for field, column in zip(schema, columns, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _flat_rows(values: NDArray[np.float32] | None) -> list[NDArray[np.float32]] | None:
    return None if values is None else list(values.astype(np.float32).reshape(len(values), -1))


def _from_arrow(columns: pa.Table, entry: TaskEntry, metadata: TableMetadata) -> TaskRows:
    n, num_layers = columns.num_rows, metadata.backbone.num_layers
    vectors = np.empty((0, metadata.encoder.dimension), np.float32)
    if VECTOR in columns.column_names:
        vectors = _vectors(columns, metadata)
    texts = columns["text"].to_pylist()
    common = (columns["id"].to_pylist(), vectors)
    if entry.kind == "labels":
        labels = len(entry.label_words)
        return TaskRows(
            *common,
            golds=_golds(columns, labels),
            label_logprobs=_matrix(columns, "label_logprobs", (n, num_layers, labels)),
            texts=texts,
        )
    probed = (n, len(entry.layers))
    return TaskRows(
        *common,
        reference_logprob=_matrix(columns, "reference_logprob", probed),
        agreement=_matrix(columns, "agreement", probed),
        texts=texts,
    )


def _vectors(columns: pa.Table, metadata: TableMetadata) -> NDArray[np.float32]:
    vectors = _matrix(columns, VECTOR, (columns.num_rows, metadata.encoder.dimension))
    lengths = np.linalg.norm(vectors, axis=1)
    if not np.allclose(lengths, 1, atol=1e-3):
        raise TableError(f"a vector has length {lengths[np.abs(lengths - 1).argmax()]:.3f}, not 1")
    return vectors


def _matrix(columns: pa.Table, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A list column as a float32 array of that shape, all finite; else TableError."""
    column = columns[name].combine_chunks()
    width = int(np.prod(shape[1:]))
    if column.null_count:
        raise TableError(f"column {name} has {column.null_count} empty cells")
    sizes = set(column.value_lengths().to_pylist()) - {width}
    if sizes:
        raise TableError(f"column {name} has cells of {sorted(sizes)} values, expected {width}")
    values = column.flatten().to_numpy(zero_copy_only=False)
    if not np.isfinite(values).all():
        raise TableError(f"column {name} holds values that are not finite")
    return values.reshape(shape)


def _golds(columns: pa.Table, num_labels: int) -> NDArray[np.int32]:
    column = columns["gold"]
    if column.null_count:
        raise TableError(f"column gold has {column.null_count} empty cells")
    golds = column.to_numpy()
    outside = golds[(golds < 0) | (golds >= num_labels)]
    if len(outside):
        raise TableError(f"gold label {outside[0]} is not within 0..{num_labels - 1}")
    return golds.astype(np.int32)
