"""What `raee-serve table plot` draws of a table."""

import numpy as np
import pytest

from raee_serve.cli import main
from raee_serve.exits.choice import Choice
from raee_serve.retrieval.plot_command import task_pictures
from raee_serve.retrieval.replayed import replay_of
from tests.unit.exit_tables import free_text_rows, new_table, put_free_text, put_labels
from tests.unit.table_rows import entry

pytestmark = pytest.mark.unit

N = 20


@pytest.fixture
def table(uri):
    """sst2: half of the rows best at layer 2, a quarter at 4, a quarter nowhere right; xsum: at 2
    or 4, which were probed; cr: no probes."""
    table = new_table(uri)
    right = [[0.1, 0.9, 0.6, 0.1]] * 10 + [[0.1, 0.1, 0.1, 0.7]] * 5 + [[0.3, 0.1, 0.1, 0.1]] * 5
    put_labels(table, "sst2", right)
    put_free_text(table, "xsum", free_text_rows([[0.95, 0.9]] * 3 + [[0.5, 1]]))
    put_labels(table, "cr", [[0.1, 0.9, 0.9, 0.1]] * 5, has_fit=False)
    table.put_task(entry("mr"))  # no rows
    return table


def test_shares_of_rows(table):
    cr, sst2, xsum = task_pictures(table.uri)
    assert sst2.num_rows == N
    np.testing.assert_allclose(sst2.best_exit, [0.25, 0.5, 0, 0.25])
    np.testing.assert_allclose(sst2.right["probe"], [np.nan, 0.5, 0.5, 0.25])
    np.testing.assert_allclose(xsum.best_exit, [0, 0.75, 0, 0.25])
    nan = np.nan
    np.testing.assert_allclose(xsum.right["plain"], [nan, 0.8375, nan, 0.925], rtol=1e-6)
    assert np.isnan(xsum.right["shortcut"]).all()
    assert list(cr.right) == ["plain"]
    np.testing.assert_allclose(cr.right["plain"], [nan, 1, 1, nan])


def test_depths_are_those_of_the_stored_choice(table):
    choice = Choice(3, 0.9)
    table.put_choices({"sst2": choice, "xsum": Choice(3, 0.75)})
    _, sst2, xsum = task_pictures(table.uri)
    [outcome] = replay_of(table, "sst2").outcomes([choice])
    assert sst2.choice == choice and sst2.mean_depth == pytest.approx(outcome.depth)
    assert sst2.depth.sum() == pytest.approx(1)
    np.testing.assert_allclose(xsum.depth, [0, 1, 0, 0])  # nearly as good at 2 as at 4


def test_the_command_draws_a_png(table, tmp_path, capsys):
    out = tmp_path / "table.png"
    assert main(["table", "plot", table.uri, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    assert "drew cr, sst2, xsum of" in capsys.readouterr().out


def test_what_cannot_be_drawn_is_named(tmp_path, capsys):
    empty = new_table(str(tmp_path / "empty"))
    empty.put_task(entry("sst2"))
    for uri, out, message in (
        (empty.uri, tmp_path / "x.png", "holds no task of two rows or more"),
        (empty.uri, tmp_path / "none" / "x.png", "there is no directory"),
        (str(tmp_path / "missing"), tmp_path / "x.png", "no such directory"),
    ):
        assert main(["table", "plot", uri, "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
