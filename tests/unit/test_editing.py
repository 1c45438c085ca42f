"""Changing a table that is there: finish, replace, drop, delete."""

import dataclasses
import re

import numpy as np
import pytest

from raee_serve import cli
from raee_serve.errors import BindingError, TableError
from raee_serve.exits.choice import Choice
from raee_serve.table.build import complete
from raee_serve.table.info_command import describe
from raee_serve.table.schema import Built
from raee_serve.table.store import ExitTable
from tests.unit.table_rows import (
    add_all,
    entry,
    fitting_rows,
    label_rows,
    metadata,
    replace_all,
    row_ids,
)

pytestmark = pytest.mark.unit

CHOICE = Choice(3, 0.9)
OTHER = dataclasses.replace(entry("sst2"), version="0123456789ab")


@pytest.fixture
def table(uri):
    """Two tasks of two rows each, one of them calibrated."""
    table = ExitTable.open_or_create(uri, metadata())
    for name in ("sst2", "mr"):
        add_all(table, name, label_rows([f"{name}-a", f"{name}-b"]))
    table.put_choices({"sst2": CHOICE})
    return table


def swap(table, task, ids):
    """Puts the rows that were made ready in the place of the task's, without a fit."""
    table.finish(task, Built(len(ids), "a few"), None, replacing=ids)


def ids(uri, task="sst2"):
    return sorted(ExitTable.open(uri).rows(task).ids)


def test_a_replacement_is_seen_at_once_and_only_when_it_is_finished(uri, table):
    table.begin_replace(OTHER)
    assert table.row_ids("sst2") == set()
    table.add("sst2", label_rows(["new"]))
    table.add("sst2", label_rows(["sst2-a"]))
    seen = ExitTable.open(uri)
    assert seen.metadata.tasks["sst2"] == entry("sst2") and seen.metadata.choices
    assert seen.count_rows() == 4 and ids(uri) == ["sst2-a", "sst2-b"]
    assert "2 rows of a replacement that has not been finished" in "\n".join(describe(uri))
    swap(table, "sst2", {"new", "sst2-a"})
    assert seen.rows("sst2").ids == ["sst2-a", "sst2-b"]  # who had it open has it still
    seen = ExitTable.open(uri)
    assert seen.metadata.tasks["sst2"] == OTHER and ids(uri) == ["new", "sst2-a"]
    assert (seen.count_rows(), seen.count_unseen()) == (4, 0)
    assert ids(uri, "mr") == ["mr-a", "mr-b"]


def test_a_choice_goes_with_the_rows_it_was_made_from(uri, table):
    table.put_choices({"mr": CHOICE})
    table.begin_replace(entry("sst2"))
    table.add("sst2", label_rows(["new"]))
    ExitTable.open(uri).put_choices({"sst2": CHOICE})  # late: for the rows that are about to go
    swap(table, "sst2", {"new"})
    assert ExitTable.open(uri).metadata.choices == {"mr": CHOICE}


def test_a_replacement_goes_on_where_it_was_cut_short(uri, table):
    table.begin_replace(entry("sst2"))
    table.add("sst2", label_rows(["new", "dropped from the second list"]))
    again = ExitTable.open(uri)
    again.begin_replace(entry("sst2"))
    assert again.row_ids("sst2") == {"new", "dropped from the second list"}
    again.add("sst2", label_rows(["newer"]))
    swap(again, "sst2", {"new", "newer"})
    assert ids(uri) == ["new", "newer"] and ExitTable.open(uri).count_unseen() == 0


def test_rows_of_another_template_are_no_part_of_a_replacement(uri, table):
    table.begin_replace(OTHER)
    table.add("sst2", label_rows(["by the other template"]))
    again = ExitTable.open(uri)
    again.begin_replace(entry("sst2"))
    assert again.row_ids("sst2") == set()
    swap(again, "sst2", set())
    assert ids(uri) == [] and ExitTable.open(uri).count_unseen() == 0


def test_a_replacement_whose_rows_went_is_not_finished(uri, table):
    table.begin_replace(entry("sst2"))
    table.add("sst2", label_rows(["new"]))
    ExitTable.open(uri).drop_task("sst2")
    with pytest.raises(TableError, match=f"{re.escape(uri)}: 2 new rows of task sst2 are gone"):
        swap(table, "sst2", {"new", "newer"})


def test_replacing_a_task_that_is_not_there_puts_it_there(uri, table):
    table.begin_replace(entry("cr"))
    table.add("cr", label_rows(["c"]))
    assert "cr" not in ExitTable.open(uri).metadata.tasks
    swap(table, "cr", {"c"})
    assert ids(uri, "cr") == ["c"]


def test_who_adds_to_a_task_that_was_replaced_or_dropped_is_told(uri, table):
    late, later = ExitTable.open(uri), ExitTable.open(uri)
    table.begin_replace(OTHER)
    table.add("sst2", label_rows(["new"]))
    swap(table, "sst2", {"new"})
    with pytest.raises(BindingError, match=f"{re.escape(uri)}: task sst2 was dropped or replaced"):
        late.add("sst2", label_rows(["late"]))
    assert ids(uri) == ["new"]
    table.drop_task("sst2")
    with pytest.raises(BindingError, match="dropped or replaced"):
        later.add("sst2", label_rows(["later"]))
    fresh = ExitTable.open(uri)
    fresh.put_task(entry("sst2"))  # rows that came too late do not come back with it
    assert ids(uri) == []


def test_rows_never_join_those_of_another_template(uri, table):
    other = ExitTable.open(uri)
    other.drop_task("sst2")
    other.put_task(OTHER)
    other.add("sst2", label_rows(["by the other template"]))
    table.put_task(entry("trec"))  # shows what the other writer did
    assert table.row_ids("sst2") == set()
    with pytest.raises(BindingError, match="sst2 was dropped or replaced by another writer"):
        table.add("sst2", label_rows(["by the first"]))
    assert ids(uri) == ["by the other template"]


def test_of_two_who_replace_a_task_the_second_is_told(uri, table):
    late = ExitTable.open(uri)
    for writer in (table, late):
        writer.begin_replace(OTHER)
        writer.add("sst2", label_rows(["new"]))
    swap(table, "sst2", {"new"})
    with pytest.raises(BindingError, match="sst2 was dropped or replaced by another writer"):
        late.add("sst2", label_rows(["late"]))


def test_who_deletes_rows_of_a_task_that_was_replaced_is_told(uri, table):
    late = ExitTable.open(uri)
    table.begin_replace(OTHER)
    table.add("sst2", label_rows(["sst2-a"]))
    swap(table, "sst2", {"sst2-a"})
    with pytest.raises(BindingError, match=r"sst2 was dropped .* nothing of it deleted"):
        late.delete_rows({"sst2-a", "mr-a"})
    assert (ids(uri), ids(uri, "mr")) == (["sst2-a"], ["mr-b"])


def test_choices_made_together_are_of_the_rows_they_were_made_from(uri, table):
    late = ExitTable.open(uri)
    table.begin_replace(OTHER)
    table.add("sst2", label_rows(["new"]))
    swap(table, "sst2", {"new"})
    late.put_choices({"mr": CHOICE, "sst2": CHOICE})
    assert ExitTable.open(uri).metadata.choices == {"mr": CHOICE}


def test_of_two_who_add_a_task_at_once_the_second_must_agree(uri, table):
    same, other = ExitTable.open(uri), ExitTable.open(uri)
    table.put_task(entry("cr"))
    table.add("cr", label_rows(["c"]))
    same.put_task(entry("cr"))
    same.add("cr", label_rows(["c", "d"]))
    assert ids(uri, "cr") == ["c", "d"]
    with pytest.raises(BindingError, match="0123456789ab"):
        other.put_task(dataclasses.replace(entry("cr"), version="0123456789ab"))


def test_dropping_a_task_leaves_the_others(uri, table):
    table.drop_task("sst2")
    left = ExitTable.open(uri)
    assert list(left.metadata.tasks) == ["mr"] and left.metadata.choices == {}
    assert left.count_rows() == 2
    with pytest.raises(TableError, match="holds no task 'sst2'; it holds: mr"):
        table.drop_task("sst2")
    left.put_task(OTHER)  # under whatever template
    left.add("sst2", label_rows(["sst2-a"]))
    assert ids(uri) == ["sst2-a"]


def test_dropping_a_task_leaves_one_whose_name_begins_like_it(uri, table):
    table.put_task(entry("sst5"))
    longer = dataclasses.replace(entry("sst5"), name="sst2x")
    table.put_task(longer)
    table.drop_task("sst2")
    assert set(ExitTable.open(uri).metadata.tasks) == {"mr", "sst5", "sst2x"}


def test_rows_are_deleted_by_id_in_any_task(uri, table):
    table.delete_rows(["sst2-a", "mr-b", "mr-b"])
    assert ids(uri) == ["sst2-b"] and ids(uri, "mr") == ["mr-a"]
    table.delete_rows(["sst2-b"])
    assert ids(uri) == [] and "sst2" in ExitTable.open(uri).metadata.tasks


def test_unknown_ids_are_named_and_nothing_is_deleted(uri, table):
    unknown = [f"it's {n}" for n in range(9)]
    with pytest.raises(TableError, match=r"no row it's 0, .*it's 4 and 4 more; nothing was"):
        table.delete_rows(["sst2-a", *unknown])
    with pytest.raises(TableError, match="no row binding"):
        table.delete_rows(["binding"])  # a record is no row
    assert ids(uri) == ["sst2-a", "sst2-b"]


def test_a_replacement_swaps_rows_and_fit_in_one_version(uri, table):
    add_all(table, "cr", fitting_rows())
    table.put_choices({"cr": CHOICE})
    old, version = table.fit("cr"), table.version
    later = dataclasses.replace(entry("cr"), version="0123456789ab")
    rows = fitting_rows(50, layer=3, seed="new")
    table.begin_replace(later)
    table.add("cr", rows)
    staged = ExitTable.open(uri)
    assert staged.fit("cr").digest == old.digest and staged.count("cr") == 60
    complete(table, "cr", rows.ids, progress=False)
    assert table.version == version + 2  # rows made ready, then all else at once
    seen = ExitTable.open(uri)
    fit = seen.fit("cr")
    assert seen.metadata.tasks["cr"] == later and seen.metadata.built["cr"] == Built(50)
    assert set(fit.ids) == seen.row_ids("cr") == set(rows.ids) and fit.digest != old.digest
    assert "cr" not in seen.metadata.choices
    assert not fit.is_right[:, 1].mean() > 0.8 > 0.95 > fit.is_right[:, 2].mean()


def test_the_fit_is_to_the_rows_that_are_wanted_alone(uri, table):
    """Rows left over from a replacement that was cut short are no part of it."""
    table.begin_replace(entry("cr"))
    table.add("cr", fitting_rows(10, seed="left over"))
    rows = fitting_rows()
    table.add("cr", rows)
    complete(table, "cr", rows.ids, progress=False)
    seen = ExitTable.open(uri)
    assert set(seen.fit("cr").ids) == set(rows.ids) == seen.row_ids("cr")


def test_a_task_is_no_task_before_it_is_finished(uri, table):
    table.put_task(entry("cr"))
    table.add("cr", fitting_rows())
    assert "cr" not in ExitTable.open(uri).metadata.built
    complete(table, "cr", progress=False)
    assert ExitTable.open(uri).metadata.built["cr"] == Built(60)


def test_more_rows_are_fitted_with_the_others(uri, table):
    add_all(table, "cr", fitting_rows())
    first = table.fit("cr")
    add_all(table, "cr", fitting_rows(seed="more"))
    second = ExitTable.open(uri).fit("cr")
    assert set(first.ids) < set(second.ids) == table.row_ids("cr") and len(second.ids) == 120
    assert second.digest != first.digest and table.metadata.built["cr"] == Built(120)


def test_where_nothing_is_new_nothing_is_fitted_or_written(uri, table, monkeypatch):
    add_all(table, "cr", fitting_rows())
    version = table.version
    monkeypatch.setattr("raee_serve.table.build.fit_task", None)
    assert complete(table, "cr", progress=False).seconds == 0
    assert ExitTable.open(uri).version == version


def test_rows_that_are_deleted_are_fitted_to_no_more(uri, table):
    rows = fitting_rows(60)
    add_all(table, "cr", rows)
    assert run("delete", uri, "--id", rows.ids[3]) == 0
    seen = ExitTable.open(uri)
    assert set(seen.fit("cr").ids) == set(rows.ids) - {rows.ids[3]}
    assert run("delete", uri, *(part for own in rows.ids[20:] for part in ("--id", own))) == 0
    seen = ExitTable.open(uri)
    assert seen.fit("cr") is None and seen.metadata.built["cr"].no_fit.startswith("it has 19 rows")


def test_a_fit_goes_with_the_task_that_is_dropped(uri, table):
    add_all(table, "cr", fitting_rows())
    table.drop_task("cr")
    seen = ExitTable.open(uri)
    assert "cr" not in seen.metadata.built and seen.fit("cr") is None
    add_all(seen, "cr", label_rows(row_ids(3)))
    assert seen.fit("cr") is None


def test_a_fit_for_rows_that_another_writer_replaced_is_not_stored(uri, table):
    add_all(table, "cr", fitting_rows())
    late = ExitTable.open(uri)
    late.put_task(entry("cr"))
    later = dataclasses.replace(entry("cr"), version="0123456789ab")
    replace_all(table, later, fitting_rows(50, seed="new"))
    with pytest.raises(BindingError, match="cr was dropped or replaced by another writer"):
        late.finish("cr", Built(60), late.fit("cr"))
    seen = ExitTable.open(uri)
    assert len(seen.fit("cr").ids) == 50 and seen.metadata.built["cr"] == Built(50)


def test_states_that_are_not_finite_are_refused(uri, table):
    rows = fitting_rows()
    rows.states[4, 1, 3] = np.nan
    with pytest.raises(TableError, match=r"task cr: no probes can be fitted: .*not finite"):
        add_all(table, "cr", rows)
    assert "cr" not in ExitTable.open(uri).metadata.built


def run(*argv):
    return cli.main(["table", *argv])


def test_commands(uri, table, tmp_path, capsys, monkeypatch):
    version = table.version
    listed = tmp_path / "ids"
    listed.write_text("sst2-b\nmr-b\n")
    assert run("delete", uri, "--id", "sst2-a", "--ids", str(listed)) == 0
    assert "deleted 3 rows; 1 rows left" in capsys.readouterr().out
    assert run("rollback", uri, "--to", str(version)) == 0
    assert f"is version {version} again: 4 rows" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", listed.open())
    assert run("delete", uri, "--ids", "-") == 0
    assert run("drop", uri, "--task", "mr") == 0
    assert run("compact", uri, "--keep-days", "1") == 0
    capsys.readouterr()
    assert run("history", uri) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()[3:]) for line in lines[-7:]] == [
        "1 3 rows deleted",
        "1 mr: 1 rows, no probes",  # what is left is fitted anew
        f"4 rolled back to version {version}",
        "2 2 rows deleted",
        "2 mr: 1 rows, no probes",
        "2 sst2: 1 rows, no probes",
        "1 task mr dropped",
    ]
    assert np.all(np.diff([int(line.split()[0]) for line in lines[1:]]) > 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["delete"], "no row ids given; use --id ID or --ids FILE"),
        (["delete", "--id", "nobody"], "holds no row nobody; nothing was deleted"),
        (["delete", "--ids", "/nowhere"], "cannot read row ids from /nowhere"),
        (["drop", "--task", "trec"], "holds no task 'trec'; it holds: mr, sst2"),
        (["rollback", "--to", "99"], "there is no version 99; there are 1-"),
        (["compact", "--keep-days", "-1"], "--keep-days is -1; allowed: 0"),
    ],
)
def test_commands_name_what_is_wrong(uri, table, capsys, argv, message):
    before = table.version
    assert run(argv[0], uri, *argv[1:]) == 1
    assert message in capsys.readouterr().err
    assert ExitTable.open(uri).version == before


def test_the_table_commands_are_listed(capsys):
    assert cli.main(["table", "--help"]) == 0
    listed = capsys.readouterr().out
    assert cli.main(["table"]) == 2
    assert capsys.readouterr().out == listed
    for name in ("info", "history", "rollback", "drop", "delete", "compact"):
        assert f"table {name} " in listed
    assert "serve" not in listed
