"""Settings chosen on a table's own rows, each left out in turn."""

import re

import numpy as np
import pytest

from raee_serve.cli import main
from raee_serve.errors import RaeeError, TaskError
from raee_serve.evaluation.calibrate_command import Budget
from raee_serve.evaluation.documents import SEED, unseen_documents
from raee_serve.retrieval.aggregate import RULES, decide
from raee_serve.retrieval.leave_one_out import LeaveOneOut, Outcome, frontier
from raee_serve.table.datasets import shortened, shuffled_examples
from raee_serve.table.evidence import label_evidence
from raee_serve.table.schema import RuleChoice, TaskEntry, TaskRows, row_id
from raee_serve.table.store import ExitTable
from raee_serve.table.tasks import get_task
from tests.unit.table_rows import entry, label_rows, metadata, unit_vectors

pytestmark = pytest.mark.unit

N, LAYERS = 60, 4


@pytest.fixture(scope="module")
def task_rows():
    """Layer 3 is mostly right, layer 4 on the first half of space only, layers 1 and 2 never."""
    vectors = unit_vectors(N)
    right = np.full((N, LAYERS), 0.2)
    right[:50, 2] = 0.8
    right[vectors[:, 0] > 0, 3] = 0.9
    return label_rows([str(i) for i in range(N)], vectors, right)


@pytest.fixture(scope="module")
def rows(task_rows):
    return LeaveOneOut(task_rows.vectors, task_rows.golds, task_rows.label_logprobs)


def outcome(accuracy, depth):
    return Outcome(RuleChoice("earliest", 12, 0.95, 1.0), accuracy, depth)


@pytest.mark.parametrize("rule", ["earliest", "published"])
def test_a_row_is_asked_as_if_the_table_did_not_hold_it(rule, task_rows, rows):
    """The same by hand, row for row, from a table without it."""
    k, layers, correct = 5, [], []
    evidence = label_evidence(task_rows.label_logprobs, task_rows.golds)
    answers = task_rows.label_logprobs.argmax(axis=2)
    similarities = task_rows.vectors @ task_rows.vectors.T
    for i in range(N):
        others = np.delete(np.arange(N), i)
        near = others[np.argsort(-similarities[i, others], kind="stable")[:k]]
        found = decide(RULES[rule], evidence[near][:, None], 1 - similarities[i, near])
        layer = LAYERS if found is None else found[0]
        layers.append(layer)
        correct.append(answers[i, layer - 1] == task_rows.golds[i])
    [found] = rows.outcomes(rule, k, 1.0, [0.95])
    assert found.accuracy == pytest.approx(np.mean(correct))
    assert found.depth == pytest.approx(np.mean(layers) / LAYERS)


def test_baselines(task_rows, rows):
    answers = task_rows.label_logprobs.argmax(axis=2)
    assert rows.full_depth() == pytest.approx((answers[:, -1] == task_rows.golds).mean())
    assert rows.best_layer()[0] == 3
    assert 0 <= rows.label_vote(8) <= 1
    most_frequent = np.bincount(task_rows.golds).max() / N
    assert rows.stacked_vote() >= most_frequent - 0.02


def test_every_rule_is_tried(rows):
    outcomes = list(rows.every_outcome())
    assert {o.choice.rule for o in outcomes} == set(RULES)
    assert all(0 <= o.accuracy <= 1 and 1 / LAYERS <= o.depth <= 1 for o in outcomes)
    assert max(o.choice.k for o in outcomes) < N


def test_the_frontier_holds_what_nothing_beats():
    best = frontier([outcome(0.7, 0.5), outcome(0.6, 0.6), outcome(0.8, 0.9), outcome(0.7, 0.4)])
    assert [(o.accuracy, o.depth) for o in best] == [(0.7, 0.4), (0.8, 0.9)]


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
def uri(tmp_path, task_rows):
    uri = str(tmp_path / "table")
    table = ExitTable.open_or_create(uri, metadata())
    table.put_task(entry("sst2"))
    table.put_task(entry("xsum"))
    table.add("sst2", task_rows)
    return uri


def test_the_command_stores_its_choice(uri, tmp_path, capsys):
    png = tmp_path / "frontier.png"
    command = ["calibrate", "--table", uri, "--task", "sst2", "--budget", "depth<=0.8"]
    assert main([*command, "--png", str(png)]) == 0
    choice = ExitTable.open(uri).metadata.choices["sst2"]
    printed = capsys.readouterr().out
    assert "label vote of 32 neighbours" in printed and "best fixed layer (3)" in printed
    assert f"stored {choice.rule}, k {choice.k}" in printed
    assert png.stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--generate", "8"], "--generate 8 needs .* --model"),
        (["--generate", "0", "--model", "m"], "--generate 0 needs at least 1 document"),
        (["--generate", "8", "--model", "m"], "for free text, and sst2 has label words"),
        (["--model", "m"], "--model and --base-url go with --generate"),
        (["--base-url", "http://127.0.0.1:9"], "--model and --base-url go with --generate"),
    ],
)
def test_answers_are_asked_for_only_where_they_can_be(uri, flags, message, capsys):
    command = ["calibrate", "--table", uri, "--task", "sst2", "--budget", "depth<=0.8"]
    assert main([*command, *flags]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_answers_are_to_documents_that_the_table_lacks(tmp_path):
    """Which was built with one of them whole, and with another one cut."""
    task, words = get_task("demo_summary"), 3
    whole, other, *unseen = shuffled_examples(task, "train", None, SEED)
    [cut] = shortened([other], words)
    table = ExitTable.open_or_create(str(tmp_path / "table"), metadata())
    table.put_task(TaskEntry.of(task, (), (2, 4)))
    found = np.full((2, 2), 0.5, np.float32)
    ids = [row_id(task.name, known.text, known.gold) for known in (whole, cut)]
    table.add(task.name, TaskRows(ids, unit_vectors(2), None, None, found, found, found))
    assert unseen_documents(table, task, None, 3, words) == shortened(unseen[:3], words)
    with pytest.raises(TaskError, match=f"has {len(unseen)} training documents that .* lacks"):
        unseen_documents(table, task, None, len(unseen) + 1, words)


@pytest.mark.parametrize(
    ("task", "budget", "message"),
    [
        ("sst2", "accuracy>=1.0", "no setting has accuracy >= 1"),
        ("sst2", "quality>=0.9", "does not fit sst2, a labels task; allowed: 'accuracy>=X'"),
        ("xsum", "depth<=0.5", "task xsum has 0 rows"),
        ("cr", "depth<=0.5", "task 'cr' is not one of .*; those are: sst2, xsum"),
    ],
)
def test_what_cannot_be_is_an_error_and_stores_nothing(uri, task, budget, message, capsys):
    assert main(["calibrate", "--table", uri, "--task", task, "--budget", budget]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert ExitTable.open(uri).metadata.choices == {}
