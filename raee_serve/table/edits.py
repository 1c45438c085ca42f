"""The changes that can be made to an exit table, each as one commit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from raee_serve.exits.choice import Choice
from raee_serve.exits.fit import TaskFit
from raee_serve.table.records import (
    RECORD,
    built_id,
    built_record,
    choice_id,
    choice_record,
    task_id,
    task_record,
)
from raee_serve.table.schema import Built, TableMetadata, TaskEntry


@dataclass(frozen=True, slots=True)
class Edit:
    """One commit.

    what: said of it in the table's history.
    rows: added where there is none of the same id and shelf yet.
    records: by id, put in the place of those that are there; new_records: only where there is none.
    blobs: bytes beside some of the records, by the same ids.
    delete: SQL condition; rows and records that meet it go, save those that are part of the edit.
    """

    what: str
    rows: pa.Table | None = None
    records: Mapping[str, str] = field(default_factory=dict)
    new_records: Mapping[str, str] = field(default_factory=dict)
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    delete: str | None = None


def add_task(entry: TaskEntry) -> Edit:
    return Edit(f"task {entry.name} added", new_records={task_id(entry.name): task_record(entry)})


def choose(choices: Mapping[str, Choice], metadata: TableMetadata) -> Edit:
    records = {
        choice_id(name): choice_record(choice, metadata.tasks[name])
        for name, choice in choices.items()
    }
    return Edit(f"{', '.join(choices)}: calibrated", records=records)


def finish(entry: TaskEntry, built: Built, fit: TaskFit | None) -> Edit:
    """The rows on the entry's shelf are complete, and this is the fit to them."""
    record = built_id(entry.shelf)
    return Edit(
        f"{entry.name}: {built.rows} rows, " + ("fitted" if fit else "no probes"),
        records={record: built_record(built, entry)},
        blobs={} if fit is None else {record: fit.to_bytes()},
    )


def replace_rows(
    entry: TaskEntry, built: Built, fit: TaskFit | None, surplus: Collection[str]
) -> Edit:
    """The task's rows are from now on the ones on the entry's shelf, less the surplus ids.

    The calibrated choice, which was made from the old rows, goes with them.
    """
    others = f"{all_shelves(entry.name)} AND task != '{entry.shelf}'"
    gone = [others, f"task = '{RECORD}' AND id = '{choice_id(entry.name)}'"]
    gone.append(f"{_all_built(entry.name)} AND id != '{built_id(entry.shelf)}'")
    if surplus:
        gone.append(f"task = '{entry.shelf}' AND id IN ({sql_list(sorted(surplus))})")
    finished = finish(entry, built, fit)
    return replace(
        finished,
        what=f"{entry.name}: replaced by {built.rows} rows",
        records={task_id(entry.name): task_record(entry), **finished.records},
        delete=" OR ".join(f"({condition})" for condition in gone),
    )


def drop_task(name: str) -> Edit:
    records = f"task = '{RECORD}' AND id IN ({sql_list([task_id(name), choice_id(name)])})"
    delete = f"{all_shelves(name)} OR ({records}) OR ({_all_built(name)})"
    return Edit(f"task {name} dropped", delete=delete)


def delete_rows(ids: Collection[str], metadata: TableMetadata) -> Edit:
    delete = f"{rows_of(metadata)} AND id IN ({sql_list(sorted(ids))})"
    return Edit(f"{len(ids)} rows deleted", delete=delete)


def rows_of(metadata: TableMetadata) -> str:
    """Condition: a row of any task, as readers see it."""
    return on_shelves([entry.shelf for entry in metadata.tasks.values()])


def on_shelves(shelves: Sequence[str]) -> str:
    """Condition: a row on one of them."""
    return f"(task IN ({sql_list(shelves)}))" if shelves else "(false)"


def all_shelves(name: str) -> str:
    """Condition: a row of that task, seen or not."""
    # Task names hold no quotes, see `Task`.
    return f"(task = '{name}' OR starts_with(task, '{name}/'))"


def _all_built(name: str) -> str:
    """Condition: a record of what a build made of that task's rows, whichever they were."""
    return f"task = '{RECORD}' AND starts_with(id, '{built_id(name)}/')"


def sql_list(values: Sequence[str]) -> str:
    """`'a', 'b'`, for a condition."""
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)
