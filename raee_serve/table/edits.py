"""The changes that can be made to an exit table, each as one commit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from raee_serve.table.records import (
    RECORD,
    choice_id,
    choice_record,
    records_of,
    task_id,
    task_record,
)
from raee_serve.table.schema import RuleChoice, TableMetadata, TaskEntry


@dataclass(frozen=True, slots=True)
class Edit:
    """One commit.

    what: said of it in the table's history.
    rows: added where there is none of the same id and shelf yet.
    records: by id, put in the place of those that are there; new_records: only where there is none.
    delete: SQL condition; rows and records that meet it go, save those that are part of the edit.
    """

    what: str
    rows: pa.Table | None = None
    records: Mapping[str, str] = field(default_factory=dict)
    new_records: Mapping[str, str] = field(default_factory=dict)
    delete: str | None = None


def take_over(metadata: TableMetadata) -> Edit:
    """The records of a table of format 1."""
    return Edit("taken over from format 1", new_records=records_of(metadata))


def add_task(entry: TaskEntry) -> Edit:
    return Edit(f"task {entry.name} added", new_records={task_id(entry.name): task_record(entry)})


def choose(choices: Mapping[str, RuleChoice], metadata: TableMetadata) -> Edit:
    records = {
        choice_id(name): choice_record(choice, metadata.tasks[name])
        for name, choice in choices.items()
    }
    return Edit(f"{', '.join(choices)}: calibrated", records=records)


def replace_rows(entry: TaskEntry, count: int, surplus: Collection[str]) -> Edit:
    """The task's rows are from now on the `count` ones on the entry's shelf, less the surplus ids.

    The calibrated choice, which was made from the old rows, goes with them.
    """
    others = f"{all_shelves(entry.name)} AND task != '{entry.shelf}'"
    gone = [others, f"task = '{RECORD}' AND id = '{choice_id(entry.name)}'"]
    if surplus:
        gone.append(f"task = '{entry.shelf}' AND id IN ({sql_list(sorted(surplus))})")
    return Edit(
        f"{entry.name}: replaced by {count} rows",
        records={task_id(entry.name): task_record(entry)},
        delete=" OR ".join(f"({condition})" for condition in gone),
    )


def drop_task(name: str) -> Edit:
    ids = sql_list([task_id(name), choice_id(name)])
    records = f"task = '{RECORD}' AND id IN ({ids})"
    return Edit(f"task {name} dropped", delete=f"{all_shelves(name)} OR ({records})")


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
    # Task names come from the registry and hold no quotes.
    return f"(task = '{name}' OR starts_with(task, '{name}/'))"


def sql_list(values: Sequence[str]) -> str:
    """`'a', 'b'`, for a condition."""
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)
