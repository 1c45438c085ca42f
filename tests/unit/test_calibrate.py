"""Settings chosen on a table's own rows, each left out in turn."""

import re
from dataclasses import replace

import pytest

from raee_serve.cli import main
from raee_serve.errors import RaeeError, TaskError
from raee_serve.evaluation.calibrate_command import Budget
from raee_serve.evaluation.documents import SEED, unseen_documents
from raee_serve.exits.choice import Choice
from raee_serve.exits.replay import BUDGETS, NEIGHBOURS, Outcome
from raee_serve.table.schema import TaskEntry, row_id
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import shortened, shuffled_examples
from raee_serve.tasks.registry import get_task
from tests.unit.exit_tables import free_text_rows, new_table, put_labels
from tests.unit.table_rows import entry

pytestmark = pytest.mark.unit

N = 60


def outcome(accuracy, depth):
    return Outcome(Choice(12, 0.95), accuracy, depth)


def test_a_budget_takes_the_best_within_it():
    outcomes = [outcome(0.7, 0.4), outcome(0.75, 0.5), outcome(0.8, 0.9)]
    assert Budget.parse("accuracy>=0.72").choose(outcomes).depth == 0.5
    assert Budget.parse("depth <= 0.6").choose(outcomes).accuracy == 0.75


def test_a_budget_that_cannot_be_met_says_what_can():
    outcomes = [outcome(0.7, 0.4), outcome(0.8, 0.9)]
    with pytest.raises(RaeeError, match=r"accuracy >= 0.9; nearest: accuracy 0.800 at depth 0.9"):
        Budget.parse("accuracy>=0.9").choose(outcomes)
    with pytest.raises(RaeeError, match=r"depth <= 0.1; nearest: accuracy 0.700 at depth 0.4"):
        Budget.parse("depth<=0.1").choose(outcomes)


@pytest.mark.parametrize("text", ["accuracy=0.8", "depth>=0.5", "accuracy>=1.2", "depth<=.", ""])
def test_a_budget_that_is_none_is_named(text):
    with pytest.raises(RaeeError, match=r"allowed: 'accuracy>=X' or 'depth<=Y'"):
        Budget.parse(text)


@pytest.fixture
def table(uri):
    """sst2: layer 2 answers two of three rows, layer 3 nearly all; cr: too few rows for probes;
    xsum: none."""
    table = new_table(uri)
    third = [0.1, 0.9, 0.9, 0.9], [0.2, 0.7, 0.8, 0.7], [0.1, 0.2, 0.7, 0.9]
    put_labels(table, "sst2", [*third * (N // 3 - 1), *[[0.1] * 4] * 3])
    put_labels(table, "cr", [[0.1, 0.9, 0.9, 0.9]] * 9, has_fit=False)
    table.put_task(entry("xsum"))
    return table


def test_the_command_stores_its_choice(table, tmp_path, capsys):
    png = tmp_path / "frontier.png"
    command = ["calibrate", "--table", table.uri, "--task", "sst2", "--budget", "depth<=0.8"]
    assert main([*command, "--png", str(png)]) == 0
    choice = ExitTable.open(table.uri).metadata.choices["sst2"]
    assert choice.k in NEIGHBOURS["probe"] and choice.budget in BUDGETS
    printed = capsys.readouterr().out
    for line in ("full depth, by LM head", "full depth, by probe", "best fixed layer (3)"):
        assert line in printed
    assert "label vote of 128 neighbours" in printed and f"stored {choice} in" in printed
    chosen = re.search(r"chosen .* accuracy ([0-9.]+) at depth ([0-9.]+)", printed)
    assert float(chosen[1]) >= 0.9 and float(chosen[2]) <= 0.8
    assert png.stat().st_size > 1000


def test_a_picture_into_a_missing_folder_is_refused_before_anything_is_done(table, capsys):
    command = ["calibrate", "--table", table.uri, "--task", "sst2", "--budget", "depth<=0.8"]
    assert main([*command, "--png", "/nowhere/f.png"]) == 1
    told = capsys.readouterr()
    assert "there is no directory /nowhere" in told.err and not told.out
    assert ExitTable.open(table.uri).metadata.choices == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--generate", "8"], "--generate 8 needs .* --model"),
        (["--generate", "0", "--model", "m"], "--generate 0 needs at least 1 document"),
        (["--generate", "8", "--model", "m"], "for free text, and sst2 has labels"),
        (["--model", "m"], "--model and --base-url go with --generate"),
        (["--base-url", "http://127.0.0.1:9"], "--model and --base-url go with --generate"),
    ],
)
def test_answers_are_asked_for_only_where_they_can_be(table, flags, message, capsys):
    command = ["calibrate", "--table", table.uri, "--task", "sst2", "--budget", "depth<=0.8"]
    assert main([*command, *flags]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_answers_are_to_documents_that_the_table_lacks(tmp_path):
    """Which was built with one of them whole, and with another one cut."""
    task, words = get_task("demo_summary"), 3
    whole, other, *unseen = shuffled_examples(task, "train", None, SEED)
    [cut] = shortened([other], words)
    table = new_table(str(tmp_path / "table"))
    table.put_task(TaskEntry.of(task, (), (2, 4)))
    ids = [row_id(task.name, known.text, known.gold) for known in (whole, cut)]
    table.add(task.name, replace(free_text_rows([[0.5, 0.5]] * 2), ids=ids))
    assert unseen_documents(table, task, None, 3, words) == shortened(unseen[:3], words)
    with pytest.raises(TaskError, match=f"has {len(unseen)} training documents that .* lacks"):
        unseen_documents(table, task, None, len(unseen) + 1, words)


@pytest.mark.parametrize(
    ("task", "budget", "message"),
    [
        ("sst2", "accuracy>=1.0", "no setting has accuracy >= 1"),
        ("sst2", "quality>=0.9", "does not fit sst2, a labels task; allowed: 'accuracy>=X'"),
        ("xsum", "depth<=0.5", "task xsum has 0 rows"),
        ("cr", "depth<=0.5", "task cr has no probes .* the paper's rule, which has no budget"),
        ("mr", "depth<=0.5", "task 'mr' is not one of .*; those are: cr, sst2, xsum"),
    ],
)
def test_what_cannot_be_is_an_error_and_stores_nothing(table, task, budget, message, capsys):
    assert main(["calibrate", "--table", table.uri, "--task", task, "--budget", budget]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert ExitTable.open(table.uri).metadata.choices == {}
