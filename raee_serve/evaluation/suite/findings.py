"""What a study found: rows of figures, and how to draw them. Kept as JSON, read as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Row = dict[str, str | float | int]


@dataclass(frozen=True, slots=True)
class Picture:
    """One colour for each value of `series`: the rows' column `y` over their column `x`.

    error: columns of the lower and upper end of an interval around y, if there are such.
    log: whether x is drawn on a logarithmic scale.
    joined: whether a series is a line, of rows that lead from one to the next.
    """

    x: str
    y: str
    series: str
    error: tuple[str, str] | None = None
    log: bool = False
    joined: bool = True


@dataclass(frozen=True, slots=True)
class Findings:
    """rows: mostly of the same columns. notes: what a reader has to know beside the question.

    beside: drawn to the right of `picture`, in the same file.
    """

    rows: Sequence[Row]
    picture: Picture
    notes: Sequence[str] = ()
    beside: Sequence[Picture] = ()


def as_json(study: str, question: str, settings: Mapping[str, Any], findings: Findings) -> str:
    about = {"study": study, "question": question, "settings": settings}
    return json.dumps({**about, **asdict(findings)}, indent=1)


def made_with(text: str, settings: Mapping[str, Any]) -> bool:
    """Whether findings kept as JSON are of these settings."""
    return bool(json.loads(text)["settings"] == json.loads(json.dumps(settings)))


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Of all rows, in the order in which they first appear."""
    return list(dict.fromkeys(column for row in rows for column in row))


def as_csv(findings: Findings) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(findings.rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(findings.rows)
    return text.getvalue()
