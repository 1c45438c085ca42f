"""History, rollback and compaction: a version is the whole of what the table held."""

import re
from datetime import timedelta

import numpy as np
import pytest

from raee_serve.errors import TableError
from raee_serve.exits.choice import Choice
from raee_serve.table.schema import Built
from raee_serve.table.store import ExitTable
from raee_serve.table.versions import KEEP, PRUNE_MARGIN_S, prune_age
from tests.unit.table_rows import (
    add_all,
    entry,
    fitting_rows,
    label_rows,
    metadata,
    unit_vectors,
)

pytestmark = pytest.mark.unit

CHOICE = Choice(3, 0.9)
DAY = timedelta(days=1)


@pytest.fixture
def table(uri):
    table = ExitTable.open_or_create(uri, metadata())
    table.put_task(entry("sst2"))
    table.add("sst2", label_rows(["a", "b", "c"]))
    return table


def test_every_change_is_a_version_with_its_rows(table):
    table.put_choices({"sst2": CHOICE})
    table.delete_rows(["a"])
    history = table.history()
    assert [(v.what, v.rows) for v in history] == [
        ("created", 0),
        ("task sst2 added", 0),
        ("sst2: 3 rows added", 3),
        ("sst2: calibrated", 3),
        ("1 rows deleted", 2),
    ]
    assert [v.number for v in history] == [1, 2, 3, 4, 5] and table.version == 5
    assert [v.time for v in history] == sorted(v.time for v in history)


def test_rolling_back_restores_rows_tasks_and_choices_together(uri, table):
    table.put_choices({"sst2": CHOICE})
    before, version = table.rows("sst2"), table.version
    table.begin_replace(entry("sst2"))
    table.add("sst2", label_rows(["x"], vectors=unit_vectors(1, seed=1)))
    table.finish("sst2", Built(1), None, replacing={"x"})
    table.put_task(entry("xsum"))
    table.rollback(version)
    for seen in (table, ExitTable.open(uri)):
        assert seen.metadata.tasks == {"sst2": entry("sst2")}
        assert seen.metadata.choices == {"sst2": CHOICE}
        rows = seen.rows("sst2")
        order = [rows.ids.index(id) for id in before.ids]
        np.testing.assert_array_equal(rows.vectors[order], before.vectors)
        assert len(rows) == 3
    assert table.history()[-1].what == f"rolled back to version {version}"
    table.add("sst2", label_rows(["d"]))  # and it goes on from there
    assert ExitTable.open(uri).row_ids("sst2") == {"a", "b", "c", "d"}


def test_rolling_back_brings_the_old_fit_back(uri):
    table = ExitTable.open_or_create(uri, metadata())
    add_all(table, "sst2", fitting_rows())
    version, fit = table.version, table.fit("sst2")
    add_all(table, "sst2", fitting_rows(10, seed="more"))
    grown, later = table.version, table.fit("sst2")
    assert later.digest != fit.digest
    table.rollback(version)
    for seen in (table, ExitTable.open(uri)):
        assert seen.fit("sst2").to_bytes() == fit.to_bytes()
        assert seen.metadata.built["sst2"] == Built(60) and seen.count("sst2") == 60
    table.rollback(grown)
    assert table.fit("sst2").digest == later.digest
    table.drop_task("sst2")
    table.rollback(grown)
    assert table.fit("sst2").digest == later.digest


def test_a_build_says_how_it_ended(uri, table):
    add_all(table, "mr", fitting_rows())
    add_all(table, "sst2", label_rows(["d"]))
    told = [v.what for v in table.history()]
    assert told[-5:] == [
        "task mr added",
        "mr: 60 rows added",
        "mr: 60 rows, fitted",
        "sst2: 1 rows added",
        "sst2: 4 rows, no probes",
    ]


def test_a_rollback_can_be_rolled_back(table):
    table.drop_task("sst2")
    dropped = table.version
    table.rollback(dropped - 1)
    table.rollback(dropped)
    assert not table.metadata.tasks and table.count_rows() == 0


def test_rolling_back_beside_a_writer(uri, table):
    """The writer's rows come on top of the old version."""
    writer, version = ExitTable.open(uri), table.version
    table.delete_rows(["a", "b"])
    table.rollback(version)
    writer.add("sst2", label_rows(["d"]))
    assert ExitTable.open(uri).row_ids("sst2") == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    ("number", "message"),
    [(99, "there is no version 99; there are 1-3"), (0, "no version 0"), (3, "the present one")],
)
def test_no_such_version(uri, table, number, message):
    with pytest.raises(TableError, match=f"{re.escape(uri)}: cannot roll back: .*{message}"):
        table.rollback(number)
    assert ExitTable.open(uri).version == 3


def test_compaction_keeps_rows_and_recent_versions(uri, table):
    for n in range(4):
        table.add("sst2", label_rows([f"row{n}"]))
    before = table.history()
    table.compact()
    after = ExitTable.open(uri).history()
    assert [(v.what, v.rows) for v in after] == [(v.what, v.rows) for v in before]
    assert [v.number for v in after[:-1]] == [v.number for v in before[:-1]]
    assert after[-1].number == table.version > before[-1].number
    for version in before[2:]:
        table.rollback(version.number)
        assert table.count_rows() == version.rows


def test_compaction_drops_what_it_is_told_to(uri, table):
    table.compact(timedelta(0))
    (only,) = ExitTable.open(uri).history()
    assert only.what == "sst2: 3 rows added" and only.rows == 3
    assert ExitTable.open(uri).row_ids("sst2") == {"a", "b", "c"}
    with pytest.raises(TableError, match=f"no version 1; there are {only.number}"):
        table.rollback(1)


def test_what_was_present_within_the_time_kept_stays_however_old():
    now, day = 100 * 86400.0, 86400.0
    built, mended = now - 30 * day, now - 20 * day
    margin = timedelta(seconds=PRUNE_MARGIN_S)
    replaced_today = [built, mended, now - 60]
    assert prune_age(replaced_today, now, KEEP) == 20 * DAY + margin
    assert prune_age([built, mended], now, KEEP) == KEEP  # the latest stays by itself
    assert prune_age([now - day], now, KEEP) == KEEP
    assert prune_age([built, now - 8 * day, now - 6 * day], now, KEEP) == 8 * DAY + margin
