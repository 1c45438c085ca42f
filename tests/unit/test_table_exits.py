"""The exits of a table's rows, as benchmarks draw them."""

import json

import pytest

from benchmarks.table_exits import main, table_exits
from raee_serve.errors import TaskError
from raee_serve.exits.choice import Choice
from tests.unit.exit_tables import new_table, put_labels
from tests.unit.table_rows import entry

pytestmark = pytest.mark.unit

N = 20


@pytest.fixture
def table(uri):
    """All rows of sst2 are right at the third of four layers, and surer at the last."""
    table = new_table(uri)
    put_labels(table, "sst2", [[0.1, 0.1, 0.8, 0.9]] * N)
    table.put_task(entry("cr"))  # no rows
    return table


@pytest.mark.parametrize(("budget", "layer"), [(0.85, 3), (0.95, 4)])
def test_exits_are_those_of_the_stored_choice(table, budget, layer):
    table.put_choices({"sst2": Choice(5, budget)})
    shares = table_exits(table.uri, "sst2")
    assert shares == [float(d == layer) for d in range(1, 5)]


def test_the_command_prints_what_the_benchmark_reads(table, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["table_exits", "--table", table.uri, "--task", "sst2"])
    main()
    shares = json.loads(capsys.readouterr().out)
    assert len(shares) == 4 and sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("task", ["cr", "mr"])
def test_a_task_without_rows_is_refused(table, task):
    with pytest.raises(TaskError, match=f"'{task}' has not two rows"):
        table_exits(table.uri, task)
