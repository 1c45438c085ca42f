"""`raee-serve table check` finds what is wrong with a table, and nothing in a sound one."""

import dataclasses

import lancedb
import numpy as np
import pytest

from raee_serve.cli import main
from raee_serve.exits.fit import TaskFit
from raee_serve.table.edits import rows_of
from raee_serve.table.store import EXITS, ExitTable
from tests.unit.table_rows import (
    add_all,
    entry,
    fitting_rows,
    label_rows,
    metadata,
    unit_vectors,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def table(tmp_path):
    table = ExitTable.open_or_create(str(tmp_path / "table"), metadata())
    table.put_task(entry("sst2"))
    table.add("sst2", label_rows([f"r{i}" for i in range(300)], unit_vectors(300)))
    return table


def check(table, capsys, *options):
    """(exit code, what was printed)."""
    code = main(["table", "check", table.uri, *options])
    return code, capsys.readouterr().out


def test_a_sound_table_with_and_without_an_index(table, capsys):
    code, text = check(table, capsys)
    assert code == 0 and "sst2: 300 rows read" in text and "no index" in text
    assert main(["table", "index", table.uri]) == 0
    code, text = check(table, capsys, "--k", "5")
    assert code == 0 and "IVF_FLAT, 0 rows not in it" in text and "recall@5 1.000" in text


def test_rows_outside_the_index_are_wrong_when_they_are_many(table, capsys):
    table.build_index("IVF_FLAT")
    table.add("sst2", label_rows(["a"], unit_vectors(1, seed=5)))
    assert check(table, capsys)[0] == 0
    table.add("sst2", label_rows([f"b{i}" for i in range(50)], unit_vectors(50, seed=6)))
    code, text = check(table, capsys)
    assert code == 1 and "52 of 351 rows are not in the index" in text


def test_an_index_that_finds_too_little_is_wrong(table, capsys, monkeypatch):
    table.build_index("IVF_PQ")
    monkeypatch.setattr("raee_serve.table.index.REFINE_FACTOR", 1)
    monkeypatch.setattr("raee_serve.table.index.PQ_REFINED", 1)
    code, text = check(table, capsys, "--recall", "1.0")
    assert code == 1 and "less than 1" in text


def test_doubled_ids_are_wrong_and_unseen_rows_are_told(table, capsys):
    exits = lancedb.connect(table.uri).open_table(EXITS)
    rows = exits.search().where(rows_of(table.metadata))
    exits.add(rows.limit(2).to_arrow())
    exits.add(rows.limit(3).to_pandas().assign(task="cola", id=["x", "y", "z"]))
    code, text = check(table, capsys)
    assert code == 1
    assert "task sst2: 2 rows have an id that another row has" in text
    assert "3 rows that no reader sees" in text and "1 faults" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": unit_vectors(2) * 3}, "length 3.000, not 1"),
        ({"golds": np.array([0, 7])}, "gold label 7"),
        ({"plain_probs": np.full((2, 4), np.inf)}, "not finite"),
    ],
)
def test_bad_rows_are_wrong(table, capsys, change, message):
    table.add("sst2", dataclasses.replace(label_rows(["a", "b"]), **change))
    code, text = check(table, capsys)
    assert code == 1 and message in text


def test_a_fit_is_read_and_one_that_cannot_be_is_wrong(table, capsys, monkeypatch):
    add_all(table, "mr", fitting_rows())
    code, text = check(table, capsys)
    assert code == 0 and "mr: 60 rows read" in text
    monkeypatch.setattr(TaskFit, "to_bytes", lambda _: b"no fit")
    add_all(table, "cr", fitting_rows(seed="cr"))
    code, text = check(table, capsys)
    assert code == 1 and "fit of task cr: a fit cannot be read" in text


def test_tasks_of_whatever_name_are_checked(table, capsys, monkeypatch):
    monkeypatch.setattr("raee_serve.tasks.registry.TASKS", {})
    assert check(table, capsys)[0] == 0


def test_bad_numbers_are_refused(table, capsys):
    assert main(["table", "check", table.uri, "--k", "0"]) == 1
    assert "--k is 0" in capsys.readouterr().err


def test_an_empty_table_has_nothing_to_index(tmp_path, capsys):
    uri = ExitTable.open_or_create(str(tmp_path / "empty"), metadata()).uri
    assert main(["table", "index", uri]) == 1
    assert "holds no rows to index" in capsys.readouterr().err
