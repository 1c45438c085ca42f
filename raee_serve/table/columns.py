"""Rows as Arrow columns and back, checked on the way out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raee_serve.errors import TableError
from raee_serve.table.records import RECORD
from raee_serve.table.schema import TableMetadata, TaskEntry, TaskRows

VECTOR = "vector"


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
        _flat_rows(rows.label_logprobs),
        _flat_rows(rows.reference_logprob),
        _flat_rows(_with_hits(rows)),
        rows.texts,
    ]
    arrays = [
        pa.nulls(n, field.type) if column is None else pa.array(column, field.type)
        for field, column in zip(schema, columns, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def records_to_arrow(records: Mapping[str, str], schema: pa.Schema) -> pa.Table:
    """Records by id. The vector, which no row may be without, is one that every index can take."""
    vectors = np.zeros((len(records), schema.field("vector").type.list_size), np.float32)
    vectors[:, 0] = 1
    return to_arrow(RECORD, TaskRows(list(records), vectors, texts=list(records.values())), schema)


def _with_hits(rows: TaskRows) -> NDArray[np.float32] | None:
    """Agreement, and after it the reference hits, which had no column of their own in format 2."""
    if rows.agreement is None or rows.reference_hits is None:
        return rows.agreement
    return np.concatenate([rows.agreement, rows.reference_hits], axis=1)


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
        labels = len(entry.label_words)
        return TaskRows(
            *common,
            golds=_golds(columns, labels),
            label_logprobs=_matrix(columns, "label_logprobs", (n, num_layers, labels)),
            texts=texts,
        )
    probed = (n, entry.num_exits)
    agreement, hits = _agreement_and_hits(columns, probed)
    return TaskRows(
        *common,
        reference_logprob=_matrix(columns, "reference_logprob", probed),
        agreement=agreement,
        reference_hits=hits,
        texts=texts,
    )


def _agreement_and_hits(
    columns: pa.Table, shape: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Both of that shape; without the latter if older versions made any of the rows."""
    column, width = columns["agreement"].combine_chunks(), shape[1]
    if pc.any(pc.greater(column.value_lengths(), width)).as_py():
        older = pc.equal(column.value_lengths(), width)
        if not pc.any(older).as_py():
            both = _matrix(columns, "agreement", (shape[0], 2 * width))
            return both[:, :width], both[:, width:]
        position = columns.column_names.index("agreement")
        columns = columns.set_column(position, "agreement", pc.list_slice(column, 0, width))
    return _matrix(columns, "agreement", shape), None


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
