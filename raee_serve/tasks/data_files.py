"""Cells out of data files: csv, tsv, jsonl and parquet, each also gzipped.

What cannot be read is a TaskError of one line that names the file, the row and the column.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raee_serve.errors import TaskError

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
LISTED = 12
"""Most names that a message lists."""
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with UTF-16's
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte-order marks, and the encodings that they announce."""

Cells = Iterator[tuple[str, tuple[Any, ...]]]
"""(where a row stands, its values in the columns that were asked for)"""


def file_cells(path: Path, columns: Sequence[str]) -> Cells:
    """The values of `columns` in every row of a data file, whose format its ending tells."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    ending = (suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]) or [""]
    if ending[0] not in FORMATS:
        raise TaskError(f"{shown(path)}: allowed endings: {', '.join(FORMATS)}, each also with .gz")
    if ending[0] == ".parquet":
        return _parquet_cells(path, columns)
    if ending[0] in (".csv", ".tsv"):
        return _csv_cells(path, columns, "\t" if ending[0] == ".tsv" else ",")
    return _jsonl_cells(path, columns)


def decoded(path: Path) -> str:
    """The text of a file: UTF-8, or what its byte-order mark says. Raises TaskError."""
    data = file_bytes(path)
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as e:
        line = e.object[: e.start].decode(encoding, "ignore").count("\n") + 1
        raise TaskError(
            f"{shown(path)}:{line}: byte 0x{e.object[e.start]:02x} is not {encoding.upper()} here; "
            "allowed: UTF-8, or UTF-16 with a byte-order mark; Latin-1 is converted by "
            "iconv -f latin1 -t utf-8"
        ) from e


def file_bytes(path: Path) -> bytes:
    """What a file holds, unzipped if its name ends in .gz. Raises TaskError."""
    try:
        if path.is_dir():
            raise TaskError(f"{shown(path)} is a directory; a file is needed")
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    except TaskError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise TaskError(f"cannot read {shown(path)}: {reason}") from e


def expanded(name: str | Path) -> Path:
    """A path with `~` for home. Raises TaskError for an empty one, or a home that nobody has."""
    if not str(name):
        raise TaskError("an empty path is not allowed")
    try:
        return Path(name).expanduser()
    except RuntimeError as e:
        raise TaskError(f"path {shown(name)}: {e}") from e


def shown(path: str | Path) -> str:
    """A path in one line."""
    return str(path) if str(path).isprintable() else repr(str(path))


def brief(value: object, width: int = 60) -> str:
    """A value in one line and not too long."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        text = f"a long {type(value).__name__}"
    return text if len(text) <= width else text[: width - 3] + "..."


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(map(brief, names[:LISTED])) + more


def _csv_cells(path: Path, columns: Sequence[str], delimiter: str) -> Cells:
    csv.field_size_limit(sys.maxsize)
    # Not splitlines(): fields may hold line separators, quoted or (U+2028) bare.
    reader = csv.reader(io.StringIO(decoded(path), newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(reader, [])
        places = places_of(f"{shown(path)}:1", columns, header)
        line = reader.line_num + 1
        for row in reader:
            where, line = f"{shown(path)}:{line}", reader.line_num + 1
            if row and len(row) != len(header):
                raise TaskError(
                    f"{where}: {len(row)} fields, and the header has {len(header)}; a field that "
                    f"holds {delimiter!r} must stand in quotes"
                )
            if row:
                yield where, tuple(row[place] for place in places)
    except csv.Error as e:
        raise TaskError(
            f"{shown(path)}:{line}: {e}; a field that begins with a quote must end with one, and "
            "quotes inside it be doubled"
        ) from e


def _jsonl_cells(path: Path, columns: Sequence[str]) -> Cells:
    # Not splitlines(): texts may hold other line separators (U+2028) unescaped.
    for number, line in enumerate(decoded(path).split("\n"), start=1):
        if line.strip():
            where = f"{shown(path)}:{number}"
            row = _object(where, line)
            places_of(where, columns, list(row))
            yield where, tuple(row[column] for column in columns)


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise TaskError(f"{where}: not JSON: {e.msg} at character {e.pos + 1}") from e
    except ValueError as e:  # Python's limit on the digits of a whole number
        limit = sys.get_int_max_str_digits()
        raise TaskError(f"{where}: a number is too long; allowed: {limit:,} digits") from e
    except RecursionError as e:
        raise TaskError(f"{where}: nested too deeply; allowed: an object of plain values") from e
    if not isinstance(row, dict):
        raise TaskError(f"{where}: {kind_of(row)}; allowed: an object, as {{...}}")
    return row


def _parquet_cells(path: Path, columns: Sequence[str]) -> Cells:
    import pyarrow as pa
    from pyarrow import parquet

    data, number = file_bytes(path), 0
    try:
        file = parquet.ParquetFile(pa.BufferReader(data))
        places_of(shown(path), columns, file.schema_arrow.names)
        for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
            cells = ((cell.as_py() for cell in batch.column(name)) for name in columns)
            for values in zip(*cells, strict=True):
                number += 1
                yield f"{shown(path)}: row {number}", values
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as e:
        where = f"row {number + 1}: " if number else ""
        raise TaskError(f"{shown(path)}: {where}cannot be read as Parquet: {one_line(e)}") from e


def places_of(where: str, columns: Sequence[str], header: Sequence[str]) -> list[int]:
    """Where the columns stand in the header. Raises TaskError unless each is there once."""
    for column in columns:
        if header.count(column) != 1:
            how = "stands there twice" if column in header else "is missing"
            raise TaskError(
                f"{where}: column {brief(column)} {how}; there are: {listed(header) or 'none'}"
            )
    return [header.index(column) for column in columns]


def kind_of(value: object) -> str:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    kinds |= {dict: "an object", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
