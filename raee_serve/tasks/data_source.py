"""Where the rows of a task are, and those rows: a text and its label or reference each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raee_serve.errors import TaskError
from raee_serve.tasks.data_files import (
    Cells,
    brief,
    expanded,
    file_cells,
    kind_of,
    one_line,
    places_of,
)


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where the rows of a task are.

    train, test: files, or splits of the hub set; test may be the share of the training rows that is
        held out, or None.
    text, gold: columns; gold has the label or the reference.
    answers: (value in the data, label) in the order of the labels; empty for free text.
    folder: what file names are relative to; None for the --data root.
    hub, config: as `datasets.load_dataset` takes them.
    """

    train: str
    test: str | float | None
    text: str
    gold: str
    answers: tuple[tuple[str, str], ...] = ()
    folder: Path | None = None
    hub: str | None = None
    config: str | None = None

    def __str__(self) -> str:
        return f"hub {self.hub}" if self.hub else str((self.folder or Path("ROOT")) / self.train)


@dataclass(frozen=True, slots=True)
class RawRow:
    """where: for messages. text: stripped, perhaps empty; then gold and kind are so too.

    gold: a label's value, or a reference. kind: what the data has it as.
    """

    where: str
    text: str
    gold: str
    kind: str


def source_rows(source: DataSource, split: str, root: str | Path | None = None) -> Iterator[RawRow]:
    """The rows of a file or a split of the hub set. Raises TaskError for what cannot be read."""
    columns = (source.text, source.gold)
    if source.hub:
        cells = _hub_cells(source, split, columns)
    else:
        cells = file_cells((source.folder or expanded(root or "")) / expanded(split), columns)
    first: RawRow | None = None
    for where, (text, gold) in cells:
        text = _text(where, source.text, text).strip()
        kind, gold = _gold(where, source.gold, gold) if text else ("", "")
        row = RawRow(where, text, gold, kind)
        first = first or (row if text else None)
        if first and text and kind != first.kind:
            raise TaskError(
                f"{where}: column {brief(source.gold)} holds {kind}, and {first.kind} at "
                f"{first.where}; allowed: one type"
            )
        yield row


def _hub_cells(source: DataSource, split: str, columns: Sequence[str]) -> Cells:
    import datasets

    where = f"{source.hub}[{split}]"
    try:
        rows = datasets.load_dataset(source.hub, source.config, split=split)
    except Exception as e:  # hub, cache and parser errors of many unrelated types
        raise TaskError(f"cannot load hub data set {source.hub} ({split}): {one_line(e)}") from e
    places_of(where, columns, rows.column_names)
    names = getattr(rows.features[source.gold], "names", None) or []
    # A label that is stored as a number goes by its name, unless the task lists numbers.
    by_name = bool(names) and {value for value, _ in source.answers} <= set(names)
    for number, row in enumerate(rows):
        text, gold = (row[column] for column in columns)
        is_known = by_name and isinstance(gold, int) and 0 <= gold < len(names)
        yield f"{where}[{number}]", (text, names[gold] if is_known else gold)


def _text(where: str, column: str, value: object) -> str:
    """A cell's text, empty for null. Raises TaskError unless it is text that can be encoded."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TaskError(
            f"{where}: column {brief(column)} holds {kind_of(value)}, {brief(value)}; allowed: text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise TaskError(
            f"{where}: column {brief(column)} holds {value[e.start]!r}, half of a surrogate pair; "
            "allowed: whole characters"
        ) from e
    return value


def _gold(where: str, column: str, value: object) -> tuple[str, str]:
    """What kind of value a cell holds, and its text. Raises TaskError for a blank."""
    if isinstance(value, bool):
        return "true or false", str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return "a number", str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise TaskError(f"{where}: column {brief(column)} is blank; allowed: a label or reference")
    if not isinstance(value, str):
        raise TaskError(
            f"{where}: column {brief(column)} holds {kind_of(value)}, {brief(value)}; allowed: "
            "text, a number, true or false"
        )
    return "text", _text(where, column, value)
