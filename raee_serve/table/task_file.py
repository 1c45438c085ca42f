"""Task files: a task in TOML, shipped or a user's own.

    name = "tickets"
    prompt = "{text}\\nIntent:"       # or [[messages]] with role and content
    labels = "auto"                  # or a list, or a table value-in-data = "text answered"
    [data]
    train = "tickets.csv"            # relative to this file; or hub = "owner/set"
    test = 0.1                       # a share held out by text, or a file
    text = "body"
    label = "category"               # or reference = "summary" for free text
    [hub]                            # instead of [data] for --data hub; a shipped task's
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from raee_serve.errors import TaskError
from raee_serve.table.data_files import (
    DataSource,
    brief,
    decoded,
    expanded,
    listed,
    shown,
    source_rows,
)
from raee_serve.table.prompts import CompletionPrompt, Prompt, chat_prompt
from raee_serve.table.task import Task

AUTO = "auto"
MOST_LABELS = 1000
"""That `labels = "auto"` takes from the data."""
DATA_KEYS = ("train", "test", "hub", "config", "text", "label", "reference")
TYPES = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a float",
    list: "an array",
    dict: "a table",
}

Answers = tuple[tuple[str, str], ...]
"""(value in the data, label), in order."""


@dataclass(frozen=True, slots=True)
class Section:
    """A table of a task file. where: the file, and the table's name within it."""

    where: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, where: str, values: object, allowed: Collection[str]) -> Section:
        """Raises TaskError unless the values are a table with allowed keys only."""
        if not isinstance(values, dict):
            raise TaskError(f"{where} is {type_name(values)}; allowed: a table")
        for key in values.keys() - allowed:
            near = get_close_matches(key, allowed, 1)
            hint = f", did you mean {near[0]}?" if near else ";"
            raise TaskError(f"{where}: unknown key {brief(key)}{hint} allowed: {', '.join(allowed)}")
        return cls(where, values)

    def string(self, key: str) -> str | None:
        """A key's value, None if it is not there. Raises TaskError unless it is a string."""
        value = self.values.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise self.wrong(key, "a string that is not empty")
        return value

    def needed(self, key: str) -> str:
        value = self.string(key)
        if value is None:
            raise TaskError(f"{self.where}: key {key} is missing")
        return value

    def one_of(self, *keys: str) -> str:
        """Which of these keys is there. Raises TaskError unless one alone is."""
        there = [key for key in keys if key in self.values]
        if len(there) != 1:
            found = "has both" if there else "has neither"
            raise TaskError(f"{self.where}: {found} {' and '.join(keys)}; allowed: one of them")
        return there[0]

    def wrong(self, key: str, allowed: str) -> TaskError:
        value = self.values[key]
        return TaskError(
            f"{self.where}: {key} is {type_name(value)}, {brief(value)}; allowed: {allowed}"
        )


def read_task_file(path: Path, *, is_shipped: bool = False) -> Task:
    """The task that a file describes. Raises TaskError, in one line, if it describes none.

    With `labels = "auto"` this reads the training data. is_shipped: file names of [data] are
    relative to the --data root instead of to the file.
    """
    where = shown(path)
    top = Section.of(where, _toml(path), ("name", "prompt", "messages", "labels", "data", "hub"))
    folder = None if is_shipped else path.absolute().parent
    try:
        name, prompt = top.needed("name"), _prompt(top)
        data = _source(top, "data", folder)
        answers = _answers(top, data)
        labels = tuple(dict.fromkeys(label for _, label in answers))
        data = data and replace(data, answers=answers)
        return Task(name, prompt, labels, data, _hub(top, answers, labels))
    except TaskError as e:
        # Prompts and tasks do not know what file they are from, and data files name themselves.
        is_placed = str(e).startswith(where) or (data_error(e))
        raise e if is_placed else TaskError(f"{where}: {e}") from e


def type_name(value: object) -> str:
    return TYPES.get(type(value), f"a {type(value).__name__}")
