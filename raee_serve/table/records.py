"""Records: what an exit table holds beside its rows, as JSON, each in a row of its own.

They lie in the same LanceDB table as the rows, so that one commit changes both and one version is
rows, tasks and calibrated choices together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import uuid4

from raee_serve.errors import TableError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.table.schema import (
    DEFAULT_QUALITY,
    FORMAT,
    METRIC,
    EncoderIdentity,
    RuleChoice,
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
    """Without what it has nothing of, for older versions know no shortcuts."""
    optional = ("shortcut_layers", "shortcuts")
    return json.dumps({k: v for k, v in asdict(entry).items() if v or k not in optional})


def choice_record(choice: RuleChoice, entry: TaskEntry) -> str:
    """A choice is bound to the rows it was made from. Older versions know no quality."""
    own = asdict(choice)
    if choice.quality == DEFAULT_QUALITY:
        del own["quality"]
    return json.dumps({"shelf": entry.shelf, "choice": own})


def metadata_of(records: Mapping[str, str]) -> TableMetadata:
    """Raises TableError if they are not records of this format."""
    try:
        binding = json.loads(records[BINDING])
        _check_format(binding, FORMAT)
        prefix = task_id("")
        entries = [_task_entry(json.loads(records[i])) for i in records if i.startswith(prefix)]
        tasks = {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}
        stored = {name: json.loads(records.get(choice_id(name), "{}")) for name in tasks}
        choices = {
            name: RuleChoice(**raw["choice"])
            for name, raw in stored.items()
            if raw.get("shelf") == tasks[name].shelf
        }
        return _metadata(binding, tasks, choices)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
        raise TableError(f"metadata cannot be read ({type(e).__name__}: {e})") from e


def metadata_of_format_1(text: str) -> TableMetadata:
    """From the one JSON text of a table of format 1. Raises TableError if it is none."""
    try:
        raw = json.loads(text)
        _check_format(raw, 1)
        entries = {
            name: _task_entry(entry | {"shelf": name}) for name, entry in raw["tasks"].items()
        }
        choices = {n: RuleChoice(**choice) for n, choice in raw.get("choices", {}).items()}
        return _metadata(raw, entries, choices)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
        raise TableError(f"metadata cannot be read ({type(e).__name__}: {e})") from e


def _check_format(raw: Mapping[str, Any], number: int) -> None:
    found = raw["format"], raw["metric"]
    if found != (number, METRIC):
        raise TableError(
            f"format and metric are {found}; this version reads formats 1 and {FORMAT}, {METRIC}"
        )


def _metadata(
    raw: Mapping[str, Any], tasks: Mapping[str, TaskEntry], choices: Mapping[str, RuleChoice]
) -> TableMetadata:
    return TableMetadata(
        BackboneIdentity(**raw["backbone"]), EncoderIdentity(**raw["encoder"]), tasks, choices
    )


def _task_entry(raw: Mapping[str, Any]) -> TaskEntry:
    lists = ("label_words", "label_token_ids", "layers", "shortcut_layers")
    fields: dict[str, Any] = {key: tuple(v) if key in lists else v for key, v in raw.items()}
    return TaskEntry(**fields)
