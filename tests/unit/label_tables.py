"""Small real tables of label tasks, made without a backbone."""

import hashlib
from collections.abc import Sequence

import numpy as np

from raee_serve.table.build import complete
from raee_serve.table.schema import TableMetadata, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.tasks.prompts import CompletionPrompt
from raee_serve.tasks.task import Task

LAYERS, HIDDEN = (1, 2, 3, 4), 32
TEXTS = ["a wonderful film", "an awful film", "a great book", "a dull book"]
MANY = [f"{text}, number {n}" for n in range(12) for text in TEXTS]
"""Enough for probes."""


def id_of(text: str) -> str:
    """A row's."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def put_labels(
    table: ExitTable,
    name: str,
    texts: Sequence[str],
    encoder,
    tokenizer,
    *,
    layer: int = 2,
    replace: bool = False,
) -> None:
    """Rows of a task, every other one of them of its first label.

    The plain head is right at `layer` alone, and states tell the labels apart from there on.
    Fewer than 40 rows have no probes.
    """
    task = Task(name, CompletionPrompt("{text} It was"), ("terrible", "great"))
    entry = TaskEntry.of(task, task.plain_token_ids(tokenizer), LAYERS)
    if replace:
        table.begin_replace(entry)
    else:
        table.put_task(entry)
    golds = (np.arange(len(texts)) % 2).astype(np.int32)
    draw = np.random.default_rng(layer)
    states = draw.normal(size=(len(texts), len(LAYERS), HIDDEN))
    states[:, layer - 1 :, 0] += 8 * golds[:, None]
    rows = TaskRows(
        list(map(id_of, texts)),
        encoder.encode(list(texts)),
        golds,
        plain_probs=np.array([[0.9 if n == layer else 0.0 for n in LAYERS]] * len(texts), "f4"),
        full_logprobs=np.log(np.full((len(texts), len(task.labels)), 0.5, "f4")),
        states=states.astype(np.float16),
    )
    table.add(name, rows)
    complete(table, name, rows.ids if replace else None, progress=False)


def new_table(uri: str, backbone, encoder) -> ExitTable:
    return ExitTable.open_or_create(uri, TableMetadata(backbone, encoder.identity()))
