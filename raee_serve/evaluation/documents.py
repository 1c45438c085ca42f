"""Documents that are summarised: which of a task's, how much of each, and where answers end."""

from __future__ import annotations

from typing import Any

from raee_serve.errors import TaskError
from raee_serve.evaluation.run import shuffled_rows
from raee_serve.table.schema import row_id
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import Example, shortened, shuffled_examples
from raee_serve.tasks.task import Task

WORDS = 400
"""Of a document, from its beginning."""
SEED = 0


def documents_to_test(
    task: Task, root: str | None, limit: int | None, seed: int = SEED, words: int = WORDS
) -> list[Example]:
    """As `shuffled_rows`, shortened."""
    return shortened(shuffled_rows(task, root, limit, seed), words)


def unseen_documents(
    table: ExitTable, task: Task, root: str | None, documents: int, words: int = WORDS
) -> list[Example]:
    """The next training documents after those that the table's rows were made of, whole or
    shortened alike; shortened.

    Raises TaskError if there are not so many.
    """
    known = set(table.rows(task.name, vectors=False).ids)
    unseen = []
    examples = shuffled_examples(task, "train", root, SEED)
    for whole, short in zip(examples, shortened(examples, words), strict=True):
        if known.isdisjoint(row_id(task.name, e.text, e.gold) for e in (whole, short)):
            unseen.append(short)
    if len(unseen) < documents:
        raise TaskError(
            f"task {task.name} has {len(unseen)} training documents that {table.uri} lacks, "
            f"{documents} are asked for"
        )
    return unseen[:documents]


def answer_settings(task: Task, max_tokens: int) -> dict[str, Any]:
    """Of every request. A backbone that only continues texts would go on with the next article."""
    settings: dict[str, Any] = {"max_tokens": max_tokens}
    return settings | {"stop": ["\n"]} if isinstance(task.render("a text"), str) else settings
