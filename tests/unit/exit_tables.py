"""Tasks in a table whose exit information a test writes down."""

import numpy as np

from raee_serve.table.schema import Built, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.tasks.registry import get_task
from tests.unit.table_rows import (
    ENCODER,
    label_rows,
    made_fit,
    metadata,
    put_fit,
    row_ids,
    unit_vectors,
)


def new_table(uri: str) -> ExitTable:
    return ExitTable.open_or_create(uri, metadata())


def put_labels(table: ExitTable, name: str, exit_probs, *, has_fit: bool = True) -> None:
    """exit_probs: [n, 4] of the gold label, right above .5; of the probes and of the plain head, or
    without a fit of the plain head alone."""
    rows = label_rows(row_ids(len(exit_probs)), right=exit_probs)
    fit = made_fit(rows.ids, exit_probs, dimension=ENCODER.dimension) if has_fit else None
    put_fit(table, name, rows, fit)


def free_text_rows(hits, vectors=None) -> TaskRows:
    """hits: [n, exits] share of the reference's tokens."""
    hits = np.array(hits, np.float32)
    vectors = unit_vectors(len(hits)) if vectors is None else vectors
    return TaskRows(row_ids(len(hits)), vectors, agreement=hits, reference_hits=hits)


def put_free_text(
    table: ExitTable, name: str, rows: TaskRows, layers=(2, 4), shortcuts=None
) -> None:
    """Rows with `reference_hits` at these layers plain, then at those of the shortcuts."""
    table.put_task(TaskEntry.of(get_task(name), (), layers, shortcuts))
    table.add(name, rows)
    table.finish(name, Built(len(rows), "it is free text"), None)
