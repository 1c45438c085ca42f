"""The key texts of a table's rows, which most tables do not keep."""

from __future__ import annotations

from raee_serve.errors import TaskError
from raee_serve.table.schema import TaskRows, row_id
from raee_serve.tasks.datasets import load_examples, shortened
from raee_serve.tasks.task import Task


def key_texts(task: Task, rows: TaskRows, data: str | None, words: int | None = None) -> list[str]:
    """[len(rows)], as the rows keep them, or else found again by their ids in the training data.

    data: as `load_examples` takes it; words: as the rows were built with. Raises TaskError unless
    that holds all of them.
    """
    known = {own: text for own, text in zip(rows.ids, rows.texts or (), strict=False) if text}
    if len(known) < len(rows):
        examples = shortened(load_examples(task, "train", data), words)
        known = {row_id(task.name, e.text, e.gold): e.text for e in examples} | known
    if missing := set(rows.ids) - known.keys():
        raise TaskError(
            f"{len(missing)} of {len(rows)} rows of task {task.name} are not in the training data "
            f"(--data {data}); were they built with another --words?"
        )
    return [known[own] for own in rows.ids]
