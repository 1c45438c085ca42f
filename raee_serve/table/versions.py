"""The versions of a table: each is rows, tasks and calibrated choices as one commit left them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from raee_serve.errors import TableError
from raee_serve.table.edits import rows_of
from raee_serve.table.records import RECORD, Change, metadata_of

KEEP = timedelta(days=7)
"""Any state that the table had within this time can be rolled back to. Readers of it, who may hold
a version open, have that long too, and LanceDB spares files of unfinished commits as long."""
PRUNE_MARGIN_S = 10.0
"""Between asking LanceDB to prune by age and its looking at the clock."""
NEVER = timedelta(days=36500)


@dataclass(frozen=True, slots=True)
class Version:
    """One state of a table.

    number: the latest version that holds it (compaction makes new ones). time: when it came to be.
    what: the change that led to it. rows: of all tasks.
    """

    number: int
    time: datetime
    what: str
    rows: int


def read_records(exits: Any) -> dict[str, str]:
    """By record id, without the bytes that lie beside some."""
    found = exits.search().where(f"task = '{RECORD}'").select(["id", "text"]).to_arrow()
    return dict(zip(found["id"].to_pylist(), found["text"].to_pylist(), strict=True))


def list_states(view: Any) -> list[Version]:
    """Every state a table can be rolled back to, oldest first, the present one last.

    view: a handle of its own, which is moved about.
    """
    states: list[Version] = []
    tokens: list[str] = []
    for listed in view.list_versions():
        view.checkout(listed["version"])
        records = read_records(view)
        change = Change.of(records)
        if tokens and tokens[-1] == change.token:
            states[-1] = replace(states[-1], number=listed["version"])
            continue
        what = change.what
        if change.token in tokens:
            what = f"rolled back to version {states[tokens.index(change.token)].number}"
        rows = view.count_rows(rows_of(metadata_of(records)))
        states.append(Version(listed["version"], listed["timestamp"], what, rows))
        tokens.append(change.token)
    return states


def seen_shelves(view: Any) -> set[str]:
    """Those whose rows were seen in any state a table can be rolled back to.

    view: a handle of its own, which is moved about.
    """
    shelves: set[str] = set()
    for listed in view.list_versions():
        view.checkout(listed["version"])
        shelves.update(entry.shelf for entry in metadata_of(read_records(view)).tasks.values())
    return shelves


def check_target(view: Any, number: int) -> None:
    """Raises TableError unless a table can be rolled back to that version.

    view: a handle of its own at the latest version, which is moved about.
    """
    latest, there = view.version, [listed["version"] for listed in view.list_versions()]
    if number not in there:
        raise TableError(f"there is no version {number}; there are {_ranges(there)}")
    if number == latest:
        raise TableError(f"version {number} is the present one")
    view.checkout(number)
    metadata_of(read_records(view))


def prune_age(times: Sequence[float], now: float, keep: timedelta) -> timedelta:
    """The age beyond which versions may go, so that every state of the last `keep` stays.

    times: when the versions came to be, ascending, in seconds. The version that was the present
    one `keep` ago stays too, however old it is itself.
    """
    older = [t for t in times if t <= now - keep.total_seconds()]
    if not older or older[-1] == times[-1]:  # the latest one always stays
        return max(keep, timedelta(milliseconds=1))
    return timedelta(seconds=now - older[-1] + PRUNE_MARGIN_S)


def compact(exits: Any, keep: timedelta) -> None:
    """Merges small files, and removes those of versions that `prune_age` lets go."""
    exits.optimize(cleanup_older_than=NEVER)  # may take long, and the age must be right afterwards
    times = [listed["timestamp"].timestamp() for listed in exits.list_versions()]
    exits.optimize(cleanup_older_than=prune_age(times, time.time(), keep))


def _ranges(numbers: Sequence[int]) -> str:
    """`1-3, 7`, of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
