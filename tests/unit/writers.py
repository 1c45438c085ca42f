"""Processes that write to one table, for tests that kill them."""

import dataclasses
import random
import sys
import traceback
from collections.abc import Iterator
from zlib import crc32

import numpy as np

from raee_serve.errors import TableError
from raee_serve.exits.choice import Choice
from raee_serve.table.build import complete
from raee_serve.table.schema import TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from tests.unit.table_rows import HIDDEN, LAYERS, entry, label_rows, metadata, row_ids

TASK = "sst2"
IDS = sorted(row_ids(48))
BATCH = 3
TOLD = 3
"""Exit code of a writer that found its task replaced, or its new rows gone, and said so."""


def entry_of(template: str) -> TaskEntry:
    return dataclasses.replace(entry(TASK), version=template)


def rows_of(template: str, ids: list[str]) -> TaskRows:
    """What any writer computes for these ids under that template."""
    draws = [np.random.default_rng(crc32(f"{template} {id}".encode())) for id in ids]
    vectors = np.stack([draw.normal(size=8) for draw in draws]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    right = np.stack([draw.uniform(0.01, 0.99, size=4) for draw in draws])
    golds = [int(draw.integers(2)) for draw in draws]
    states = np.stack([draw.normal(size=(len(LAYERS), HIDDEN)) for draw in draws])
    return label_rows(ids, vectors, right, golds, states)


def batches(seed: int) -> Iterator[list[str]]:
    """All ids, in an order of this writer's own."""
    ids = random.Random(seed).sample(IDS, len(IDS))
    return (ids[first : first + BATCH] for first in range(0, len(ids), BATCH))


def build(uri: str, seed: int, template: str = "first") -> None:
    """As `raee-serve build` does, down to the rows that are there already."""
    table = ExitTable.open_or_create(uri, metadata())
    table.put_task(entry_of(template))
    known = table.complete_ids(TASK)
    for batch in batches(seed):
        if new := [id for id in batch if id not in known]:
            table.add(TASK, rows_of(template, new))
    complete(table, TASK, progress=False)
    table.compact()


def replace(uri: str, seed: int, template: str) -> None:
    """As `raee-serve build --replace` does."""
    table = ExitTable.open_or_create(uri, metadata())
    table.begin_replace(entry_of(template))
    known = table.complete_ids(TASK)
    for batch in batches(seed):
        if new := [id for id in batch if id not in known]:
            table.add(TASK, rows_of(template, new))
    complete(table, TASK, IDS, progress=False)


def edit(uri: str, seed: int) -> None:
    """Everything else, in an order of its own, without end."""
    draw = random.Random(seed)
    while True:
        table = ExitTable.open_or_create(uri, metadata())
        act = draw.choice(["compact", "choose", "delete", "roll back", "drop"])
        if act == "compact":
            table.compact()
        elif act == "roll back":
            table.rollback(draw.choice(table.history()).number)
        elif TASK not in table.metadata.tasks:
            continue
        elif act == "choose":
            table.put_choices({TASK: Choice(draw.randint(1, 9), 0.9)})
        elif act == "delete":
            ids = sorted(table.row_ids(TASK))
            table.delete_rows(draw.sample(ids, min(2, len(ids))))
        elif draw.random() < 0.3:
            table.drop_task(TASK)


def run(work: str, *args: object) -> None:
    """The body of a process; what goes wrong beside what may go wrong ends it with code 1."""
    try:
        {"build": build, "replace": replace, "edit": edit}[work](*args)
    except TableError as error:
        expected = ("by another writer", "are gone", "is the present one", "not as template")
        if any(text in str(error) for text in expected):
            sys.exit(TOLD)
        traceback.print_exc()
        sys.exit(1)
