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
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from raee_serve.errors import TaskError
from raee_serve.tasks.data_files import brief, decoded, listed, shown
from raee_serve.tasks.data_source import DataSource, source_rows
from raee_serve.tasks.prompts import CompletionPrompt, Prompt, chat_prompt
from raee_serve.tasks.task import Task

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
        for key in values:
            if key not in allowed:
                near = get_close_matches(key, allowed, 1)
                hint = f", did you mean {near[0]}?" if near else ";"
                known = ", ".join(allowed)
                raise TaskError(f"{where}: unknown key {brief(key)}{hint} allowed: {known}")
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
            found = f"has both {' and '.join(keys)}" if there else f"has no {' and no '.join(keys)}"
            raise TaskError(f"{self.where} {found}; allowed: one of them")
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
    keys = ("name", "prompt", "messages", "labels", "data", "hub")
    top = Section.of(where, _toml(path), keys)
    name, prompt = top.needed("name"), _prompt(top)
    data = _source(top, "data", None if is_shipped else path.absolute().parent)
    answers = _answers(top, data)
    labels = tuple(dict.fromkeys(label for _, label in answers))
    hub = _hub(top, answers)
    with _naming(where):
        return Task(name, prompt, labels, data and replace(data, answers=answers), hub)


def type_name(value: object) -> str:
    return TYPES.get(type(value), f"a {type(value).__name__}")


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Puts the file's name before errors of what does not know it."""
    try:
        yield
    except TaskError as e:
        raise TaskError(f"{where}: {e}") from e


def _toml(path: Path) -> object:
    text = decoded(path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise TaskError(f"{shown(path)}: not TOML: {e}") from e
    except ValueError as e:  # Python's limit on the digits of a whole number
        raise TaskError(f"{shown(path)}: a number is too long") from e
    except RecursionError as e:
        raise TaskError(f"{shown(path)}: nested too deeply") from e


def _prompt(top: Section) -> Prompt:
    if top.one_of("prompt", "messages") == "prompt":
        with _naming(f"{top.where}: prompt"):
            return CompletionPrompt(top.needed("prompt"))
    messages = top.values["messages"]
    if not isinstance(messages, list):
        raise top.wrong("messages", "[[messages]] with role and content")
    parts = [
        Section.of(f"{top.where}: [[messages]] {number}", part, ("role", "content"))
        for number, part in enumerate(messages, 1)
    ]
    with _naming(f"{top.where}: [[messages]]"):
        return chat_prompt([(part.needed("role"), part.needed("content")) for part in parts])


def _source(top: Section, key: str, folder: Path | None) -> DataSource | None:
    """[data] or [hub], without the answers; None if it is not there."""
    if key not in top.values:
        return None
    keys = DATA_KEYS if key == "data" else (*DATA_KEYS, "labels")
    part = Section.of(f"{top.where}: [{key}]", top.values[key], keys)
    hub = part.needed("hub") if key == "hub" else part.string("hub")
    if part.string("config") and not hub:
        raise TaskError(f"{part.where}: config goes with hub")
    gold = part.one_of("label", "reference")
    if gold == "reference" and "labels" in top.values:
        raise TaskError(f"{top.where}: labels go with label of [{key}], not with reference")
    return DataSource(
        train=part.string("train") or "train" if hub else part.needed("train"),
        test=_test(part, "test" if hub else None),
        text=part.needed("text"),
        gold=part.needed(gold),
        folder=folder,
        hub=hub,
        config=part.string("config"),
    )


def _test(part: Section, default: str | None) -> str | float | None:
    value = part.values.get("test", default)
    is_share = isinstance(value, float) and 0 < value < 1
    if value is None or is_share or (isinstance(value, str) and value):
        return value
    raise part.wrong("test", "a file, or a share such as 0.1, above 0 and below 1")


def _answers(top: Section, data: DataSource | None) -> Answers:
    """The labels and their values in the data; none for free text."""
    given = top.values.get("labels")
    is_free_text = data is not None and "reference" in top.values["data"]
    if given is None and (data is None or is_free_text):
        return ()
    if given == AUTO:
        if data is None:
            raise TaskError(f'{top.where}: labels = "{AUTO}" needs [data]')
        return tuple((value, value) for value in _values_of(data))
    allowed = f'"{AUTO}", a list of strings, or a table value-in-data = "text answered"'
    if given is None:
        raise TaskError(f"{top.where}: key labels is missing; allowed: {allowed}")
    return _listed_answers(top, allowed)


def _listed_answers(part: Section, allowed: str) -> Answers:
    """`labels` that are a list or a table. Raises TaskError for anything else."""
    given = part.values["labels"]
    pairs = list(given.items()) if isinstance(given, dict) else []
    if isinstance(given, list):
        pairs = [(value, value) for value in given]
    if not pairs or not all(isinstance(label, str) for _, label in pairs):
        raise part.wrong("labels", allowed)
    for value, _ in pairs:
        if value != value.strip() or not value:
            raise TaskError(
                f"{part.where}: value {brief(value)} of labels is blank or has space around it"
            )
    return tuple(pairs)


def _hub(top: Section, answers: Answers) -> DataSource | None:
    """[hub], whose labels are the task's unless it says otherwise."""
    source = _source(top, "hub", None)
    if source is None:
        return None
    part = Section(f"{top.where}: [hub]", top.values["hub"])
    if bool(answers) != ("label" in part.values):
        raise TaskError(f"{part.where}: label goes with labels, reference with free text")
    own = answers
    if "labels" in part.values:
        own = _listed_answers(part, 'a table value-in-data = "text answered"')
    labels = {label for _, label in answers}
    for _, label in own:
        if label not in labels:
            raise TaskError(
                f"{part.where}: label {brief(label)} is none of the task's; allowed: "
                f"{listed(sorted(labels))}"
            )
    return replace(source, answers=own)


def _values_of(data: DataSource) -> list[str]:
    """The different labels of the training data, sorted. Raises TaskError for too many or few."""
    values = sorted({row.gold.strip() for row in source_rows(data, data.train) if row.text})
    if not 2 <= len(values) <= MOST_LABELS:
        raise TaskError(
            f"{data}: column {brief(data.gold)} holds {len(values):,} different values "
            f'({listed(values[:3])}); allowed with labels = "{AUTO}": 2 to {MOST_LABELS:,}'
        )
    return values
