"""Where a task's rows come from: local JSONL, a hub data set, or the demo sets shipped here."""

from __future__ import annotations

import json
import os
import random
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raee_serve.errors import TaskError

if TYPE_CHECKING:
    from raee_serve.table.task import Task

HUB = "hub"
"""The data root that stands for the hub instead of a directory."""
DEFAULT_ROOT = os.environ.get("RAEE_DATA", "../shared/data")
"""The data directory where none is given; it need not exist."""

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Example:
    """A text and its gold answer: a label index, or the reference for free text."""

    text: str
    gold: int | str


@dataclass(frozen=True, slots=True)
class LocalSet:
    """ROOT/`directory`/{train,test}.jsonl, one object a line."""

    directory: str
    text_field: str = "text"
    gold_field: str = "label"


@dataclass(frozen=True, slots=True)
class HubSet:
    """A data set for `datasets.load_dataset(path, config)`.

    labels: the gold field's values in the order of the task's labels; empty where the
        field already holds that order's index.
    """

    path: str
    config: str | None = None
    text_field: str = "text"
    gold_field: str = "label"
    labels: tuple[str | int, ...] = ()
    test_split: str = "test"


@dataclass(frozen=True, slots=True)
class DemoSet:
    """demo_data/`name`_{train,test}.jsonl inside the package."""

    name: str
    text_field: str = "text"
    gold_field: str = "label"


def add_data_argument(parser: ArgumentParser) -> None:
    """--data, as `load_examples` takes its root."""
    parser.add_argument(
        "--data",
        metavar="ROOT",
        default=DEFAULT_ROOT,
        help="data directory, or 'hub' (default: RAEE_DATA, else ../shared/data)",
    )


def add_words_argument(parser: ArgumentParser, default: int | None = None) -> None:
    """--words, as `shortened` takes it."""
    parser.add_argument(
        "--words",
        type=int,
        metavar="N",
        default=default,
        help="of a text, from its beginning: as many as clients will send "
        f"(default: {default or 'all'})",
    )


def load_examples(task: Task, split: Split, root: str | Path | None = None) -> list[Example]:
    """All examples of one split, blank texts dropped.

    root: a directory in the LocalSet layout, or "hub"; not needed for demo tasks.
    Raises TaskError naming the file (and line) or the data set that does not fit the task.
    """
    if task.demo is not None:
        rows = _demo_rows(task.demo, split)
        return list(_examples(task, task.demo, rows))
    if root is None:
        raise TaskError(f"task {task.name} needs a data directory (or {HUB!r}), none was given")
    if str(root) == HUB:
        if task.hub is None:
            raise TaskError(f"task {task.name} has no hub data set; give a data directory")
        return list(_examples(task, task.hub, _hub_rows(task.hub, split), task.hub.labels))
    if task.local is None:
        raise TaskError(f"task {task.name} has no local data set; use {HUB!r}")
    rows = _jsonl_rows(Path(root) / task.local.directory / f"{split}.jsonl")
    return list(_examples(task, task.local, rows))


def shuffled_examples(
    task: Task, split: Split, root: str | Path | None, seed: int, words: int | None = None
) -> list[Example]:
    """As `load_examples`, in an order that the seed gives: the same whenever it is asked for.

    words: as `shortened` takes it.
    """
    examples = load_examples(task, split, root)
    random.Random(seed).shuffle(examples)
    return shortened(examples, words)


def shortened(examples: Iterable[Example], words: int | None) -> list[Example]:
    """Their texts cut to the first `words`; longer ones then have single spaces between words.

    None leaves them as they are. Raises TaskError for fewer than one.
    """
    if words is not None and words < 1:
        raise TaskError(f"--words {words} is not allowed, it must be at least 1")
    return [Example(_beginning(e.text, words), e.gold) for e in examples]


def _beginning(text: str, words: int | None) -> str:
    parts = text.split()
    return text if words is None or len(parts) <= words else " ".join(parts[:words])


Rows = Iterable[tuple[str, Mapping[str, Any]]]
"""(where a row stands, for error messages; the row)"""


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise TaskError(f"cannot read data file {path}: {e.strerror}") from e
    yield from _parse_jsonl(str(path), text)


def _demo_rows(source: DemoSet, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
    file = resources.files("raee_serve") / "demo_data" / f"{source.name}_{split}.jsonl"
    yield from _parse_jsonl(str(file), file.read_text(encoding="utf-8"))


def _parse_jsonl(where: str, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Not splitlines(): texts may hold other line separators (U+2028) unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise TaskError(f"{where}:{number}: not JSON ({e})") from e
        if not isinstance(row, dict):
            raise TaskError(f"{where}:{number}: expected an object, got {type(row).__name__}")
        yield f"{where}:{number}", row


def _hub_rows(source: HubSet, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    hub_split = source.test_split if split == "test" else split
    try:
        rows = datasets.load_dataset(source.path, source.config, split=hub_split)
    except Exception as e:  # hub, cache and parser errors of many unrelated types
        raise TaskError(f"cannot load hub data set {source.path} ({hub_split}): {e}") from e
    for number, row in enumerate(rows):
        yield f"{source.path}[{hub_split}][{number}]", row


def _examples(
    task: Task, source: LocalSet | HubSet | DemoSet, rows: Rows, labels: tuple[str | int, ...] = ()
) -> Iterator[Example]:
    for where, row in rows:
        missing = {source.text_field, source.gold_field} - row.keys()
        if missing:
            raise TaskError(f"{where}: no field {sorted(missing)}; it has {sorted(row)}")
        text, gold = row[source.text_field], row[source.gold_field]
        if not isinstance(text, str):
            raise TaskError(f"{where}: field {source.text_field} is not a string: {text!r}")
        gold = labels.index(gold) if gold in labels else gold
        _check_gold(task, where, gold)
        if text.strip():
            yield Example(text.strip(), gold)


def _check_gold(task: Task, where: str, gold: object) -> None:
    if task.kind == "free-text":
        if not isinstance(gold, str) or not gold.strip():
            raise TaskError(f"{where}: the reference must be non-empty text, got {gold!r}")
    elif type(gold) is not int or not 0 <= gold < len(task.labels):
        raise TaskError(
            f"{where}: label {gold!r} of task {task.name} is not an index within "
            f"0..{len(task.labels) - 1}"
        )
