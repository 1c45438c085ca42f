"""Exit tables in LanceDB. With `index`, the only module that imports lancedb.

A table URI is a directory (or an object store's address) holding one LanceDB table: a row per
labelled prompt, and the records (`records`). One LanceDB version is one state of the whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raee_serve.errors import BindingError, RaeeError, TableError
from raee_serve.exits.choice import Choice
from raee_serve.exits.fit import TaskFit
from raee_serve.table import edits
from raee_serve.table.columns import (
    BLOB,
    VECTOR,
    from_arrow,
    records_to_arrow,
    to_arrow,
    vectors_of,
)
from raee_serve.table.commit import commit, patiently
from raee_serve.table.edits import Edit
from raee_serve.table.index import VectorIndex
from raee_serve.table.records import (
    BINDING,
    CHANGE,
    RECORD,
    Change,
    built_id,
    metadata_of,
    records_of,
)
from raee_serve.table.schema import Built, TableMetadata, TaskEntry, TaskRows, row_schema
from raee_serve.table.states import States, StateStore
from raee_serve.table.versions import (
    KEEP,
    Version,
    check_target,
    compact,
    list_states,
    read_records,
    seen_shelves,
)

EXITS = "exits"
NAMED_IDS = 5
"""Unknown row ids that an error names."""


class ExitTable:
    """One exit table, as it was when it was opened and after each change made through here.

    Others may change it meanwhile: they are not seen before, and never half.
    """

    def __init__(self, uri: str, database: Any) -> None:
        self.uri = uri
        self._database = database
        self._states = StateStore(database)
        self._put: dict[str, TaskEntry] = {}  # tasks as they were when they were put through here
        self._staged: dict[str, TaskEntry] = {}  # tasks whose rows are being replaced through here
        with _naming(uri, "cannot read it"):
            self._exits = database.open_table(EXITS)
            self._read_metadata()
            expected = row_schema(self.metadata.encoder.dimension)
            if not self._exits.schema.equals(expected):
                raise TableError(
                    f"its columns are {self._exits.schema.names}, expected {expected.names}; "
                    "build it anew"
                )

    @classmethod
    def open(cls, uri: str) -> ExitTable:
        """An existing table. Raises TableError with the URI if it is missing or corrupt."""
        if _is_local(uri) and not Path(uri).is_dir():  # lancedb would create the directory
            raise TableError(f"exit table {uri}: no such directory")
        with _naming(uri, "cannot open it"):
            database = lancedb.connect(uri)
            if EXITS not in _table_names(database):
                raise TableError(f"no LanceDB table named {EXITS} in it")
        return cls(uri, database)

    @classmethod
    def open_or_create(cls, uri: str, metadata: TableMetadata) -> ExitTable:
        """The table at `uri`, new and empty if there is none.

        Raises BindingError if an existing one is bound to another backbone or encoder.
        """
        with _naming(uri, "cannot create it"):
            database = lancedb.connect(uri)
            records = {**records_of(metadata), CHANGE: Change("created").to_json()}
            rows = records_to_arrow(records, row_schema(metadata.encoder.dimension))
            try:
                database.create_table(EXITS, data=rows)
            except ValueError as error:
                if "already exists" not in str(error):
                    raise
        table = cls(uri, database)
        table.metadata.check_backbone(metadata.backbone, uri)
        table.metadata.check_encoder(metadata.encoder, uri)
        return table

    @property
    def version(self) -> int:
        """Of the state that is seen here."""
        return int(self._exits.version)

    @property
    def state(self) -> str:
        """Another one for every other content that a table at this URI may have."""
        return f"{self.version} {self._token}"

    def put_task(self, entry: TaskEntry) -> None:
        """Records a task; BindingError if its rows here were built otherwise."""
        self.metadata.check_same(entry, self.uri)
        if entry.name not in self.metadata.tasks:
            self._commit(edits.add_task(entry.on_shelf(self._last_shelf(entry.name) + 1)))
            self.metadata.check_same(entry, self.uri)  # another writer may have come first
        self._put[entry.name] = self.metadata.tasks[entry.name]

    def put_choices(self, choices: Mapping[str, Choice]) -> None:
        """Records how exits of some of its tasks are to be chosen, as their rows are seen here:
        with rows that another writer has replaced a choice goes, too."""
        self._commit(edits.choose(choices, self.metadata))

    def add(self, task: str, rows: TaskRows) -> None:
        """Appends rows whose id is new, in one atomic commit; others are left as they are.

        Raises BindingError if the task has been dropped or replaced by another writer, or if one
        has finished the replacement that these rows are for.
        """
        entry, staged = self.entry(task), task in self._staged
        if rows.states is not None:  # before the rows: no row is without its states
            with _naming(self.uri, "cannot write its states"):
                self._states.add(entry.shelf, rows.ids, rows.states)
        what = f"{task}: {len(rows)} rows {'made ready' if staged else 'added'}"
        self._commit(Edit(what, rows=to_arrow(entry.shelf, rows, self._exits.schema)))
        if self._is_seen(entry) == staged:
            raise BindingError(
                f"exit table {self.uri}: task {task} was dropped or replaced by another writer"
            )

    def begin_replace(self, entry: TaskEntry) -> None:
        """From here on `add` and `row_ids` of this task mean rows that readers do not see yet.

        They stay when the process ends, and the next replacement by the same template goes on
        with them.
        """
        known = self.metadata.tasks.get(entry.name)
        self._staged[entry.name] = entry.on_shelf(1 + (_number(known.shelf) if known else 0))

    def finish(
        self,
        task: str,
        built: Built,
        fit: TaskFit | None,
        replacing: Collection[str] | None = None,
    ) -> None:
        """Records that a task is complete, with the fit to its rows, in one atomic commit.

        replacing: ids of the new rows, where they take the place of all rows of the task; its
        calibrated choice goes with the old ones. Raises TableError if another writer has removed
        some of the new rows, BindingError if one has dropped or replaced the task.
        """
        entry = self.entry(task)
        if replacing is None:
            self._commit(edits.finish(entry, built, fit))
            if not self._is_seen(entry):
                raise BindingError(
                    f"exit table {self.uri}: task {task} was dropped or replaced by another writer"
                )
            return
        self._exits.checkout_latest()
        there = self._staged_ids(task, replacing)
        self._commit(edits.replace_rows(entry, built, fit, there - set(replacing)))
        self._staged_ids(task, replacing)
        self._put[task] = self._staged.pop(task)

    def fit(self, task: str) -> TaskFit | None:
        """What was fitted to a task's rows; None where nothing was, see `Built.no_fit`."""
        built = self.metadata.built.get(task)
        if built is None or built.no_fit or self.metadata.tasks[task].kind != "labels":
            return None
        with _naming(self.uri, f"fit of task {task}"):
            shelf = self.metadata.tasks[task].shelf
            record = f"task = '{RECORD}' AND id = {edits.sql_list([built_id(shelf)])}"
            [found] = self._exits.search().where(record).select([BLOB]).to_list()
            return TaskFit.from_bytes(found[BLOB])

    def target_rows(self, task: str) -> TaskRows:
        """All rows among which `add` puts new ones."""
        entry = self.entry(task)
        with _naming(self.uri, f"rows of task {task}"):
            return self._read(entry, self._row_columns)

    def states(self, task: str, ids: Sequence[str]) -> States:
        """[layers, n, hidden_size] of these rows among which `add` puts new ones."""
        with _naming(self.uri, f"states of task {task}"):
            return self._states.read(self.entry(task).shelf, ids)

    def drop_task(self, task: str) -> None:
        """Removes a task with its rows and its choice. Raises TableError if it is not here."""
        if task not in self.metadata.tasks:
            known = ", ".join(self.metadata.tasks) or "none"
            raise TableError(f"exit table {self.uri} holds no task {task!r}; it holds: {known}")
        self._commit(edits.drop_task(task))
        self._put.pop(task, None)

    def delete_rows(self, ids: Collection[str]) -> None:
        """Removes rows of any task. Raises TableError naming ids that are not here.

        Raises BindingError if another writer has meanwhile dropped or replaced a task with such
        rows: of that one nothing was deleted.
        """
        rows = {entry: self._ids(entry) for entry in self.metadata.tasks.values()}
        if unknown := sorted(set(ids).difference(*rows.values())):
            more = f" and {len(unknown) - NAMED_IDS} more" if len(unknown) > NAMED_IDS else ""
            raise TableError(
                f"exit table {self.uri} holds no row {', '.join(unknown[:NAMED_IDS])}{more}; "
                "nothing was deleted"
            )
        self._commit(edits.delete_rows(set(ids), self.metadata))
        asked = [entry for entry, own in rows.items() if not own.isdisjoint(ids)]
        if gone := [entry.name for entry in asked if not self._is_seen(entry)]:
            raise BindingError(
                f"exit table {self.uri}: {', '.join(gone)} was dropped or replaced by another "
                "writer, and nothing of it deleted"
            )

    def history(self) -> list[Version]:
        """Every state it can be rolled back to, oldest first."""
        with _naming(self.uri, "cannot read its versions"):
            return list_states(self._database.open_table(EXITS))

    def rollback(self, number: int) -> None:
        """Makes a new version that is all of an old one: rows, tasks and choices.

        Raises TableError if there is no such version, or it is the present one.
        """
        with _naming(self.uri, "cannot roll back"):
            check_target(self._database.open_table(EXITS), number)
            patiently(self._exits, lambda: self._exits.restore(number))
            self._read_metadata()
        self._put.clear()

    def compact(self, keep: timedelta = KEEP) -> None:
        """Merges the files of many small additions, and drops versions beyond `keep`."""
        with _naming(self.uri, "cannot compact it"):
            patiently(self._exits, lambda: compact(self._exits, keep))
            self._read_metadata()
            if unused := self._states.shelves() - self._shelves():
                seen = seen_shelves(self._database.open_table(EXITS))
                self._states.forget(unused - seen, keep)

    def row_ids(self, task: str) -> set[str]:
        """Of the rows among which `add` puts new ones."""
        return self._ids(self.entry(task))

    def complete_ids(self, task: str) -> set[str]:
        """Of those among them that lack nothing: rows of a label task have states, too."""
        entry = self.entry(task)
        with _naming(self.uri, f"states of task {task}"):
            stated = self._states.ids(entry.shelf) if entry.kind == "labels" else None
        return self._ids(entry) if stated is None else self._ids(entry) & stated

    def count_rows(self) -> int:
        return int(self._exits.count_rows(edits.rows_of(self.metadata)))

    def count_unseen(self) -> int:
        """Rows of replacements that have not been finished."""
        seen = f"{edits.rows_of(self.metadata)} OR task = '{RECORD}'"
        return int(self._exits.count_rows(f"NOT ({seen})"))

    def size_bytes(self) -> int:
        return int(self._exits.stats()["total_bytes"])

    def rows(self, task: str, *, vectors: bool = True) -> TaskRows:
        """All rows of a task, on demand without their vectors ([0, dimension] then).

        Raises TableError naming what is wrong with them.
        """
        entry = self.metadata.tasks[task]
        columns = [n for n in self._row_columns if vectors or n != VECTOR]
        with _naming(self.uri, f"rows of task {task}"):
            return self._read(entry, columns)

    def vectors(self, task: str, at_once: int) -> Iterator[NDArray[np.float32]]:
        """The vectors of a task's rows, in the order of `rows`, up to so many at a time."""
        with _naming(self.uri, f"vectors of task {task}"):
            query = self._query(self.metadata.tasks[task], [VECTOR])
            for batch in query.to_batches(at_once):
                yield vectors_of(pa.Table.from_batches([batch]), self.metadata)

    def keys(self, task: str) -> NDArray[np.uint64]:
        """Under which `index` finds a task's rows, in the order of `rows`."""
        with _naming(self.uri, f"keys of task {task}"):
            query = self._query(self.metadata.tasks[task], ["id"])
            return query.with_row_id(True).to_arrow()["_rowid"].to_numpy()

    def count(self, task: str) -> int:
        """Rows of a task."""
        with _naming(self.uri, "cannot count its rows"):
            return int(self._exits.count_rows(self._where([task])))

    @property
    def index(self) -> VectorIndex:
        """Of the rows as they are seen here."""
        return VectorIndex(self._exits, self._where)

    def build_index(self, kind: str) -> None:
        """Makes or replaces the index; kind: of `index.KINDS`."""
        with _naming(self.uri, "cannot index it"):
            self.index.build(kind, self.count_rows())

    def entry(self, task: str) -> TaskEntry:
        """The task as `add` takes its rows."""
        return self._staged.get(task) or self._put.get(task) or self.metadata.tasks[task]

    def _ids(self, entry: TaskEntry) -> set[str]:
        with _naming(self.uri, "cannot read its row ids"):
            return set(self._query(entry, ["id"]).to_arrow()["id"].to_pylist())

    def _is_seen(self, entry: TaskEntry) -> bool:
        """Whether readers of the table as it is now find the task's rows where the entry says."""
        now = self.metadata.tasks.get(entry.name)
        return now is not None and now.shelf == entry.shelf

    def _where(self, tasks: Sequence[str]) -> str:
        """Condition: a row of one of these tasks, as readers see it."""
        return edits.on_shelves([self.metadata.tasks[task].shelf for task in tasks])

    def _staged_ids(self, task: str, wanted: Collection[str]) -> set[str]:
        """Ids of the rows that are to replace a task's. Raises TableError if any wanted is gone."""
        there = self.row_ids(task)
        if gone := len(set(wanted) - there):
            raise TableError(f"exit table {self.uri}: {gone} new rows of task {task} are gone")
        return there

    def _last_shelf(self, task: str) -> int:
        """The highest number of a shelf on which rows of a task lie, seen or left over; else 0."""
        with _naming(self.uri, "cannot read it"):
            query = self._exits.search().where(edits.all_shelves(task)).select(["task"])
            return max(map(_number, set(query.to_arrow()["task"].to_pylist())), default=0)

    @property
    def _row_columns(self) -> list[str]:
        """All that rows fill. LanceDB takes gigabytes to read the bytes of records beside them."""
        return [name for name in self._exits.schema.names if name != BLOB]

    def _query(self, entry: TaskEntry, columns: list[str]) -> Any:
        """A task's rows, in the same order whatever the columns are."""
        return self._exits.search().where(edits.on_shelves([entry.shelf])).select(columns)

    def _read(self, entry: TaskEntry, columns: list[str]) -> TaskRows:
        return from_arrow(self._query(entry, columns).to_arrow(), entry, self.metadata)

    def _shelves(self) -> set[str]:
        """All that have rows, seen or not."""
        query = self._exits.search().select(["task"])
        return set(query.to_arrow()["task"].to_pylist())

    def _read_metadata(self) -> None:
        records = read_records(self._exits)
        if BINDING not in records:
            raise TableError(
                "it holds no binding: it was made by another version, or its creation was cut "
                "short; build it anew"
            )
        self.metadata = metadata_of(records)
        self._token = Change.of(records).token

    def _commit(self, edit: Edit) -> None:
        """Carries out an edit; then its outcome is seen here, with what others did before it."""
        with _naming(self.uri, "cannot change it"):
            commit(self._exits, edit)
            self._read_metadata()


def exists(uri: str) -> bool:
    """Whether there is an exit table. Raises TableError where that cannot be told."""
    if _is_local(uri) and not Path(uri).is_dir():
        return False
    with _naming(uri, "cannot open it"):
        return EXITS in _table_names(lancedb.connect(uri))


@contextmanager
def _naming(uri: str, what: str) -> Iterator[None]:
    """Turns any failure inside into a TableError that starts with the table's URI."""
    try:
        yield
    except RaeeError as e:
        raise type(e)(f"exit table {uri}: {what}: {e}") from e
    except Exception as e:  # lancedb raises RuntimeError, OSError, ValueError and its own kinds
        raise TableError(f"exit table {uri}: {what}: {type(e).__name__}: {e}") from e


def _is_local(uri: str) -> bool:
    return "://" not in uri


def _table_names(database: Any) -> list[str]:
    return list(database.list_tables().tables)


def _number(shelf: str) -> int:
    """Of a shelf's name."""
    return int(shelf.rpartition("/")[2])
