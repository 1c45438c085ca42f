"""The rows of a task in a table, as `exits.replay` asks them."""

from __future__ import annotations

import numpy as np

from raee_serve.errors import TaskError
from raee_serve.exits.fit import TaskFit
from raee_serve.exits.replay import Replay
from raee_serve.table.evidence import free_text_quality
from raee_serve.table.schema import TaskRows
from raee_serve.table.store import ExitTable


def replay_of(table: ExitTable, task: str, most_rows: int | None = None) -> Replay:
    """The rows that have exit information; most_rows: of more, so many, spread over all of them.

    Raises TaskError for fewer than two rows, or none that have it.
    """
    entry, num_layers = table.metadata.tasks[task], table.metadata.backbone.num_layers
    rows = table.rows(task)
    if len(rows) < 2:
        raise TaskError(f"task {task} has {len(rows)} rows in the table; at least 2 are needed")
    if most_rows is not None and len(rows) > most_rows:
        rows = rows.at(np.linspace(0, len(rows) - 1, most_rows).astype(int))
    if entry.kind == "free-text":
        quality = free_text_quality(rows, entry, num_layers)
        return Replay("free-text", rows.vectors, quality, quality)
    if (fit := table.fit(task)) is not None:
        return _of_fit(rows, fit, num_layers)
    if rows.plain_probs is None:
        raise TaskError(f"task {task} has no probes: {table.metadata.built[task].no_fit}")
    evidence = rows.plain_probs[:, None]
    return Replay("plain", rows.vectors, evidence, (evidence > 0).astype(np.float32))


def _of_fit(rows: TaskRows, fit: TaskFit, num_layers: int) -> Replay:
    """Of the rows that it was fitted to."""
    at = fit.places(rows.ids)
    rows, at = rows.at(np.flatnonzero(at >= 0)), at[at >= 0]
    evidence = fit.spread(fit.exit_probs[at], num_layers)
    worth = fit.spread(fit.is_right[at], num_layers)
    return Replay("probe", rows.vectors, evidence, worth, fit.certainties[at])
