"""States beside the rows: each row's own come back, in whatever order they are asked for."""

import dataclasses
from datetime import timedelta
from pathlib import Path

import lancedb
import numpy as np
import pytest

from raee_serve.errors import TableError
from raee_serve.table import states as states_module
from raee_serve.table.build import complete
from raee_serve.table.states import StateStore
from raee_serve.table.store import ExitTable
from tests.unit.table_rows import add_all, entry, fitting_rows, metadata, replace_all

pytestmark = pytest.mark.unit

LAYERS, HIDDEN = 3, 5


@pytest.fixture
def database(uri):
    return lancedb.connect(uri)


@pytest.fixture
def store(database):
    return StateStore(database)


def states_of(*ids):
    """[n, LAYERS, HIDDEN], different ones for every id."""
    parts = [np.arange(LAYERS * HIDDEN).reshape(LAYERS, HIDDEN) + 100 * int(i) for i in ids]
    return np.stack(parts).astype(np.float16)


def test_states_come_back_by_layer_in_the_order_asked_for(store):
    store.add("sst2/x/1", ["1", "2", "3"], states_of(1, 2, 3))
    store.add("sst2/x/1", ["4"], states_of(4))
    found = store.read("sst2/x/1", ["4", "2", "1", "3"])
    assert found.shape == (LAYERS, 4, HIDDEN) and found.dtype == np.float16
    np.testing.assert_array_equal(found, states_of(4, 2, 1, 3).transpose(1, 0, 2))
    np.testing.assert_array_equal(store.read("sst2/x/1", ["3"])[:, 0], states_of(3)[0])


def test_many_batches(store, monkeypatch):
    monkeypatch.setattr(states_module, "AT_ONCE", 7)
    ids = [str(n) for n in range(50)]
    for first in range(0, 50, 20):
        own = ids[first : first + 20]
        store.add("s/x/1", own, states_of(*own))
    order = np.random.default_rng(0).permutation(50)
    wanted = [ids[i] for i in order]
    np.testing.assert_array_equal(
        store.read("s/x/1", wanted), states_of(*wanted).transpose(1, 0, 2)
    )


def test_states_of_one_row_may_be_there_twice(store):
    """Two builders, or one that was killed before its rows were in."""
    for _ in range(2):
        store.add("s/x/1", ["1", "2"], states_of(1, 2))
    store.add("s/x/1", ["2", "3"], states_of(2, 3))
    found = store.read("s/x/1", ["1", "2", "3"])
    np.testing.assert_array_equal(found, states_of(1, 2, 3).transpose(1, 0, 2))


def test_shelves_do_not_mix(store):
    store.add("sst2/x/1", ["1"], states_of(1))
    store.add("sst2/x/2", ["1", "2"], states_of(5, 6))
    np.testing.assert_array_equal(store.read("sst2/x/1", ["1"])[:, 0], states_of(1)[0])
    with pytest.raises(TableError, match="states of 1 of 2 rows are gone"):
        store.read("sst2/x/1", ["1", "2"])


def test_what_is_not_there_is_counted_and_the_remedy_named(store):
    with pytest.raises(
        TableError, match=r"states of 2 of 2 rows are gone.*build the task once more"
    ):
        store.read("s/x/1", ["1", "2"])
    store.add("s/x/1", ["1"], states_of(1))
    with pytest.raises(TableError, match="states of 2 of 3 rows are gone"):
        store.read("s/x/1", ["7", "1", "8"])


def test_many_states_lie_in_a_file(store, monkeypatch, tmp_path):
    ids = [str(n) for n in range(20)]
    store.add("s/x/1", ids, states_of(*ids))
    in_memory = store.read("s/x/1", ids)
    assert not isinstance(in_memory, np.memmap)
    monkeypatch.setattr(states_module, "IN_MEMORY_BYTES", in_memory.nbytes - 1)
    monkeypatch.setattr(states_module.tempfile, "tempdir", str(tmp_path))
    found = store.read("s/x/1", ids)
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, in_memory)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("raee")] == []


def size_of(uri):
    return sum(file.stat().st_size for file in Path(uri).rglob("*") if file.is_file())


def test_states_that_are_forgotten_are_gone_from_the_disk(store, uri):
    store.add("sst2/x/1", ["1"], states_of(1))
    before = size_of(uri)
    ids = [str(n) for n in range(500)]
    store.add("sst2/x/2", ids, states_of(*ids))
    assert store.shelves() == {"sst2/x/1", "sst2/x/2"} and size_of(uri) > before + 10_000
    store.forget({"sst2/x/2", "never/was/1"}, timedelta(0))
    assert store.shelves() == {"sst2/x/1"} and size_of(uri) == before
    assert store.ids("sst2/x/1") == {"1"} and store.ids("sst2/x/2") == set()


def test_states_that_were_added_lately_are_not_forgotten(store):
    """Their rows may be about to be written."""
    store.add("sst2/x/1", ["1"], states_of(1))
    store.forget(["sst2/x/1"], timedelta(minutes=1))
    assert store.ids("sst2/x/1") == {"1"}


def table_with(rows, uri):
    table = ExitTable.open_or_create(uri, metadata())
    add_all(table, "sst2", rows)
    return table


def test_a_rollback_finds_the_states_of_what_was_replaced(uri):
    """As long as the version can be rolled back to; then they go with it."""
    table = table_with(fitting_rows(), uri)
    version, fit = table.version, table.fit("sst2")
    replace_all(table, entry("sst2"), fitting_rows(50, seed="new"))
    table.compact()
    table.rollback(version)
    add_all(table, "sst2", fitting_rows(10, seed="more"))
    assert set(table.fit("sst2").ids) > set(fit.ids)
    table.compact(timedelta(0))
    assert StateStore(lancedb.connect(uri)).shelves() == {table.entry("sst2").shelf}
    table.drop_task("sst2")
    table.compact(timedelta(0))
    assert StateStore(lancedb.connect(uri)).shelves() == set()


def test_states_of_a_replacement_under_way_are_kept(uri):
    table = table_with(fitting_rows(), uri)
    rows = fitting_rows(50, seed="new")
    table.begin_replace(entry("sst2"))
    table.add("sst2", rows)
    ExitTable.open(uri).compact()
    assert complete(table, "sst2", rows.ids, progress=False).no_fit == ""
    assert set(ExitTable.open(uri).fit("sst2").ids) == set(rows.ids)


def test_rows_whose_states_went_lack_something(uri):
    table = table_with(fitting_rows(), uri)
    table.put_task(entry("xsum"))
    shelf = table.entry("sst2").shelf
    StateStore(lancedb.connect(uri)).forget([shelf], timedelta(0))
    assert len(table.row_ids("sst2")) == 60 and table.complete_ids("sst2") == set()
    table.add("sst2", dataclasses.replace(fitting_rows(10, seed="more"), states=None))
    with pytest.raises(TableError, match=r"states of 70 of 70 rows are gone"):
        complete(table, "sst2", progress=False)
    table.add("sst2", fitting_rows())  # as a build does for rows that lack something
    assert len(table.complete_ids("sst2")) == 60 and table.count("sst2") == 70


def test_a_shelf_whose_creation_was_cut_short_is_made_again(store, uri):
    data = Path(uri) / "states.sst2.x.1.lance" / "data"
    data.mkdir(parents=True)
    (data / "0.lance").write_bytes(b"the first file, and no version yet")
    assert store.ids("sst2/x/1") == set()
    store.add("sst2/x/1", ["1"], states_of(1))
    assert store.ids("sst2/x/1") == {"1"}


class Overtaken:
    """A connection to a database in which another writer makes each table at the same moment."""

    def __init__(self, database):
        self._database = database

    def create_table(self, name, schema):
        return self._database.create_table(name, schema=schema, mode="overwrite")


def test_who_makes_a_shelf_at_the_same_time_loses_no_states(database, store, monkeypatch):
    store.add("sst2/x/1", ["1"], states_of(1))
    late = StateStore(Overtaken(database))
    monkeypatch.setattr(late, "_opened", lambda _: None)  # when it looked there was no table
    late.add("sst2/x/1", ["2"], states_of(2))
    found = store.read("sst2/x/1", ["2", "1"])
    np.testing.assert_array_equal(found, states_of(2, 1).transpose(1, 0, 2))
