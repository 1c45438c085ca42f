"""What `raee-serve table plot` draws of a table."""

import numpy as np
import pytest

from raee_serve.cli import main
from raee_serve.retrieval.leave_one_out import LeaveOneOut
from raee_serve.retrieval.plot_command import task_pictures
from raee_serve.table.schema import RuleChoice, TaskRows
from raee_serve.table.store import ExitTable
from tests.unit.table_rows import entry, label_rows, metadata, unit_vectors

pytestmark = pytest.mark.unit

N = 20


@pytest.fixture
def table(tmp_path):
    """sst2: half of the rows best at layer 2, a quarter at 4, a quarter nowhere; xsum: at 2 or 4.

    Layers 2 and 4 of xsum are the ones that were probed.
    """
    table = ExitTable.open_or_create(str(tmp_path / "table"), metadata())
    right = [[0.1, 0.9, 0.6, 0.1]] * 10 + [[0.1, 0.1, 0.1, 0.7]] * 5 + [[0.1] * 4] * 5
    table.put_task(entry("sst2"))
    table.add("sst2", label_rows([f"a{i}" for i in range(N)], unit_vectors(N), right))
    table.put_task(entry("xsum"))
    free_text = TaskRows(
        [f"b{i}" for i in range(4)],
        unit_vectors(4),
        reference_logprob=np.log([[0.9, 0.2]] * 4).astype(np.float32),
        agreement=np.array([[0.95, 1]] * 3 + [[0.5, 1]], np.float32),
    )
    table.add("xsum", free_text)
    table.put_task(entry("cr"))  # no rows
    return table


def test_shares_of_rows(table):
    sst2, xsum = task_pictures(table.uri)
    np.testing.assert_allclose(sst2.best_exit, [0, 0.5, 0, 0.25])
    np.testing.assert_allclose(sst2.right, [0, 0.5, 0.5, 0.25])
    assert sst2.num_rows == N and sst2.right_calibrated.shape == (4,)
    np.testing.assert_allclose(xsum.best_exit, [0, 0.75, 0, 0.25])
    np.testing.assert_allclose(xsum.right, [0, 0.75, 0, 1])
    assert xsum.layers == (2, 4) and xsum.right_calibrated is None


def test_depths_are_those_of_the_stored_choice(table):
    choice = RuleChoice("earliest", 3, 0.9, 1.0)
    table.put_choices({"sst2": choice})
    table.put_choices({"xsum": RuleChoice("quality", 3, 0.95, 2.0, quality=0.75)})
    sst2, xsum = task_pictures(table.uri)
    rows = table.rows("sst2")
    left_out = LeaveOneOut(rows.vectors, rows.golds, rows.label_logprobs)
    [outcome] = left_out.outcomes("earliest", 3, 1.0, [0.9])
    assert sst2.choice == choice and sst2.mean_depth == pytest.approx(outcome.depth)
    assert sst2.depth.sum() == pytest.approx(1) and xsum.depth.sum() == pytest.approx(1)
    np.testing.assert_allclose(xsum.depth, [0, 1, 0, 0])  # most neighbours agree at 2


def test_the_command_draws_a_png(table, tmp_path, capsys):
    out = tmp_path / "table.png"
    assert main(["table", "plot", table.uri, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    assert "drew sst2, xsum of" in capsys.readouterr().out


def test_what_cannot_be_drawn_is_named(tmp_path, capsys):
    empty = ExitTable.open_or_create(str(tmp_path / "empty"), metadata())
    empty.put_task(entry("sst2"))
    for uri, out, message in (
        (empty.uri, tmp_path / "x.png", "holds no task of two rows or more"),
        (empty.uri, tmp_path / "none" / "x.png", "there is no directory"),
        (str(tmp_path / "missing"), tmp_path / "x.png", "no such directory"),
    ):
        assert main(["table", "plot", uri, "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
