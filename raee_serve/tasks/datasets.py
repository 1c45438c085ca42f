"""The examples of a task: read, checked, held out, shuffled and cut short."""

from __future__ import annotations

import hashlib
import os
import random
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from raee_serve.errors import TaskError
from raee_serve.tasks.data_files import brief, listed
from raee_serve.tasks.data_source import DataSource, RawRow, source_rows

if TYPE_CHECKING:
    from raee_serve.tasks.task import Task

HUB = "hub"
"""The data root that stands for the hub instead of a directory."""
DEFAULT_ROOT = os.environ.get("RAEE_DATA") or None
"""The data directory where none is given."""

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Example:
    """A text and its gold answer: a label index, or the reference for free text."""

    text: str
    gold: int | str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The examples of one split.

    blank: rows of the same file that have no text. duplicates: rows that repeat a text and its
    answer; they are left out where a share is held out.
    """

    examples: list[Example]
    blank: int
    duplicates: int


def add_data_argument(parser: ArgumentParser) -> None:
    """--data, as `load_examples` takes its root."""
    parser.add_argument(
        "--data",
        metavar="ROOT",
        default=DEFAULT_ROOT,
        help="directory of the shipped tasks' data, or 'hub' (default: RAEE_DATA)",
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


def load(task: Task, split: Split, root: str | Path | None = None) -> Loaded:
    """All examples of one split, blank texts left out.

    root: the directory of shipped tasks' data, or "hub"; a task with a file of its own needs none.
    Raises TaskError naming the file, row and column of what does not fit the task.
    """
    source = source_of(task, root)
    share = source.test if isinstance(source.test, float) else None
    place = source.train if split == "train" or share else source.test
    if not isinstance(place, str):
        raise TaskError(
            f"task {task.name} names no test rows; allowed as test of [data]: a file, or the share "
            "of the training rows to hold out, such as 0.1"
        )
    rows = source_rows(source, place, root)
    loaded = _load(rows, _reader(task, source), None if share is None else (share, split))
    if not loaded.examples:
        raise TaskError(f"task {task.name}: no {split} rows with a text in {place}")
    return loaded


def load_examples(task: Task, split: Split, root: str | Path | None = None) -> list[Example]:
    """The examples of one split in the order of the data; see `load`."""
    return load(task, split, root).examples


def shuffled_examples(
    task: Task, split: Split, root: str | Path | None, seed: int, words: int | None = None
) -> list[Example]:
    """As `load_examples`, in an order that the seed gives: the same whenever it is asked for.

    words: as `shortened` takes it.
    """
    return shuffled(load_examples(task, split, root), seed, words)


def shuffled(examples: Iterable[Example], seed: int, words: int | None = None) -> list[Example]:
    """See `shuffled_examples`."""
    mixed = list(examples)
    random.Random(seed).shuffle(mixed)
    return shortened(mixed, words)


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


def source_of(task: Task, root: str | Path | None) -> DataSource:
    """Where a task's rows are, given the --data root. Raises TaskError if that does not say."""
    data = task.data
    if data is None:
        raise TaskError(
            f"where the data of task {task.name} is, its table does not say; give its task file "
            "(--task FILE.toml)"
        )
    if str(root) == HUB and task.hub is not None:
        return task.hub
    if data.folder is None and not data.hub and (root is None or str(root) == HUB):
        hub = "" if task.hub is None else f", or --data hub for {task.hub.hub}"
        raise TaskError(
            f"task {task.name} is shipped without its data; give --data ROOT (or set RAEE_DATA) "
            f"with ROOT/{data.train}{hub}"
        )
    return data


def is_held_out(text: str, share: float) -> bool:
    """Whether rows of this text are among the held-out share: a matter of the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _load(
    rows: Iterable[RawRow], read: Callable[[RawRow], Example], held: tuple[float, Split] | None
) -> Loaded:
    """held: the share of rows that is held out for the test, and which side is wanted."""
    examples: list[Example] = []
    seen: set[Example] = set()
    blank = duplicates = 0
    for row in rows:
        if not row.text:
            blank += 1
            continue
        example = read(row)
        if held and is_held_out(row.text, held[0]) != (held[1] == "test"):
            continue
        duplicates += example in seen
        if not (held and example in seen):
            examples.append(example)
        seen.add(example)
    return Loaded(examples, blank, duplicates)


def _reader(task: Task, source: DataSource) -> Callable[[RawRow], Example]:
    """Turns the task's rows into examples; raises TaskError for a gold that it does not know."""
    places = {value: task.labels.index(label) for value, label in source.answers}

    def labelled(row: RawRow) -> Example:
        place = places.get(row.gold.strip())
        if place is None:
            raise TaskError(
                f"{row.where}: column {brief(source.gold)} holds {brief(row.gold)}, which is no "
                f"label of task {task.name}; allowed: {listed(list(places))}"
            )
        return Example(row.text, place)

    def referenced(row: RawRow) -> Example:
        if row.kind != "text":
            raise TaskError(
                f"{row.where}: column {brief(source.gold)} holds {row.kind}; allowed: text"
            )
        return Example(row.text, row.gold)

    return labelled if task.labels else referenced
