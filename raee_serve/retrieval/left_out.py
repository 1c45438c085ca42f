"""The rows of a task, of either kind, each to be asked as if the table did not hold it."""

from __future__ import annotations

from raee_serve.errors import TaskError
from raee_serve.retrieval.free_text import FreeTextLeaveOneOut
from raee_serve.retrieval.leave_one_out import LeaveOneOut
from raee_serve.table.evidence import evidence_of, free_text_quality
from raee_serve.table.schema import TaskEntry, TaskRows


def left_out(
    rows: TaskRows, entry: TaskEntry, num_layers: int
) -> LeaveOneOut | FreeTextLeaveOneOut:
    """rows: of `entry`, probed on a backbone of `num_layers` layers.

    Raises TaskError for fewer than two.
    """
    if len(rows) < 2:
        raise TaskError(
            f"task {entry.name} has {len(rows)} rows in the table; at least 2 are needed"
        )
    if rows.golds is not None and rows.label_logprobs is not None:
        return LeaveOneOut(rows.vectors, rows.golds, rows.label_logprobs)
    evidence = evidence_of(rows, entry, num_layers)
    return FreeTextLeaveOneOut(rows.vectors, evidence, free_text_quality(rows, entry, num_layers))
