"""Records: what an exit table holds beside its rows, as JSON, each in a row of its own.

They lie in the same LanceDB table as the rows, so that one commit changes both and one version is
rows, tasks, fits and calibrated choices together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import uuid4

from raee_serve.errors import TableError
from raee_serve.exits.choice import Choice
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.table.schema import (
    FORMAT,
    METRIC,
    Built,
    EncoderIdentity,
    TableMetadata,
    TaskEntry,
)

RECORD = "#record"
"""Stands in the `task` column of records, whose `id` says which it is and whose `text` holds it."""
BINDING, CHANGE = "binding", "change"


def task_id(name: str) -> str:
    return f"task {name}"


def choice_id(name: str) -> str:
    return f"choice {name}"


def built_id(shelf: str) -> str:
    """By shelf: who is late with the fit to rows that were replaced spoils nothing."""
    return f"built {shelf}"


@dataclass(frozen=True, slots=True)
class Change:
    """What the last commit did. Every commit writes this record, so that of two at once one is
    refused and done again on top of the other.

    token: unlike any other; the same in two versions that hold the same.
    """

    what: str
    token: str = field(default_factory=lambda: uuid4().hex)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, records: Mapping[str, str]) -> Change:
        return cls(**json.loads(records[CHANGE]))


def records_of(metadata: TableMetadata) -> dict[str, str]:
    """By record id."""
    records = {BINDING: binding_record(metadata)}
    for entry in metadata.tasks.values():
        records[task_id(entry.name)] = task_record(entry)
    for name, choice in metadata.choices.items():
        records[choice_id(name)] = choice_record(choice, metadata.tasks[name])
    return records


def binding_record(metadata: TableMetadata) -> str:
    return json.dumps(
        {
            "format": metadata.format,
            "metric": metadata.metric,
            "backbone": asdict(metadata.backbone),
            "encoder": asdict(metadata.encoder),
        }
    )


def task_record(entry: TaskEntry) -> str:
    return json.dumps(asdict(entry))


def choice_record(choice: Choice, entry: TaskEntry) -> str:
    """A choice is bound to the rows it was made from."""
    return json.dumps({"shelf": entry.shelf, "choice": asdict(choice)})


def built_record(built: Built, entry: TaskEntry) -> str:
    """The record beside which a fit lies as bytes; bound to the rows likewise."""
    return json.dumps({"shelf": entry.shelf, "built": asdict(built)})


def metadata_of(records: Mapping[str, str]) -> TableMetadata:
    """Raises TableError if they are not records of this format."""
    try:
        binding = json.loads(records[BINDING])
        _check_format(binding)
        prefix = task_id("")
        entries = [_task_entry(json.loads(records[i])) for i in records if i.startswith(prefix)]
        tasks = {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}
        choices = _of_rows(records, tasks, lambda entry: choice_id(entry.name), "choice")
        built = _of_rows(records, tasks, lambda entry: built_id(entry.shelf), "built")
        return TableMetadata(
            BackboneIdentity(**binding["backbone"]),
            EncoderIdentity(**binding["encoder"]),
            tasks,
            {name: Choice(**own) for name, own in choices.items()},
            {name: Built(**own) for name, own in built.items()},
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
        raise TableError(f"metadata cannot be read ({type(e).__name__}: {e})") from e


def _of_rows(
    records: Mapping[str, str],
    tasks: Mapping[str, TaskEntry],
    id_of: Callable[[TaskEntry], str],
    key: str,
) -> dict[str, Any]:
    """By task: what the records of one kind say of the rows that are there."""
    stored = {name: json.loads(records.get(id_of(own), "{}")) for name, own in tasks.items()}
    return {n: raw[key] for n, raw in stored.items() if raw.get("shelf") == tasks[n].shelf}


def _check_format(raw: Mapping[str, Any]) -> None:
    found = raw["format"], raw["metric"]
    if found != (FORMAT, METRIC):
        raise TableError(
            f"format and metric are {found}; this version reads {FORMAT}, {METRIC}. Build the "
            "table anew (raee-serve build)"
        )


def _task_entry(raw: Mapping[str, Any]) -> TaskEntry:
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
    return TaskEntry(**fields)
