"""Rows as Arrow columns and back, checked on the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raee_serve.errors import TableError
from raee_serve.table.records import RECORD
from raee_serve.table.schema import TableMetadata, TaskEntry, TaskRows

VECTOR, BLOB = "vector", "blob"


def to_arrow(shelf: str, rows: TaskRows, schema: pa.Schema) -> pa.Table:
    n = len(rows)
    dimension = schema.field("vector").type.list_size
    assert rows.vectors.shape == (n, dimension), f"{rows.vectors.shape} is not [{n}, {dimension}]"
    vectors = pa.FixedSizeListArray.from_arrays(rows.vectors.astype(np.float32).ravel(), dimension)
    columns = [
        rows.ids,
        [shelf] * n,
        vectors,
        None if rows.golds is None else rows.golds.astype(np.int32),
        _flat_rows(rows.plain_probs),
        _flat_rows(rows.full_logprobs),
        _flat_rows(rows.agreement),
        _flat_rows(rows.reference_hits),
        rows.texts,
        None,
    ]
    arrays = [
        pa.nulls(n, field.type) if column is None else pa.array(column, field.type)
        for field, column in zip(schema, columns, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def records_to_arrow(
    records: Mapping[str, str], schema: pa.Schema, blobs: Mapping[str, bytes] | None = None
) -> pa.Table:
    """Records by id, with the bytes that lie beside some of them.

    The vector, which no row may be without, is one that every index can take.
    """
    vectors = np.zeros((len(records), schema.field("vector").type.list_size), np.float32)
    vectors[:, 0] = 1
    rows = TaskRows(list(records), vectors, texts=list(records.values()))
    column = pa.array([(blobs or {}).get(name) for name in records], pa.large_binary())
    return to_arrow(RECORD, rows, schema).set_column(
        schema.get_field_index(BLOB), schema.field(BLOB), column
    )


def _flat_rows(values: NDArray[np.float32] | None) -> list[NDArray[np.float32]] | None:
    return None if values is None else list(values.astype(np.float32).reshape(len(values), -1))


def from_arrow(columns: pa.Table, entry: TaskEntry, metadata: TableMetadata) -> TaskRows:
    n, num_layers = columns.num_rows, metadata.backbone.num_layers
    vectors = np.empty((0, metadata.encoder.dimension), np.float32)
    if VECTOR in columns.column_names:
        vectors = vectors_of(columns, metadata)
    texts = columns["text"].to_pylist()
    common = (columns["id"].to_pylist(), vectors)
    if entry.kind == "labels":
        shapes = {"plain_probs": (n, num_layers), "full_logprobs": (n, len(entry.labels))}
        plain: dict[str, Any] = {}
        if entry.plain_token_ids:
            plain = {name: _matrix(columns, name, shape) for name, shape in shapes.items()}
        return TaskRows(*common, golds=_golds(columns, len(entry.labels)), texts=texts, **plain)
    return TaskRows(
        *common,
        agreement=_matrix(columns, "agreement", (n, entry.num_exits)),
        reference_hits=_matrix(columns, "reference_hits", (n, entry.num_exits)),
        texts=texts,
    )


def vectors_of(columns: pa.Table, metadata: TableMetadata) -> NDArray[np.float32]:
    """[n, dimension], all of length 1; else TableError."""
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
