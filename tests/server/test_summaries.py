"""Summaries of the shipped notes through the running server, at several depths."""

import asyncio
from types import SimpleNamespace

import pytest

from raee_serve.cli import main
from raee_serve.evaluation.documents import unseen_documents
from raee_serve.evaluation.run import LENGTH_FLAGS, PATIENCE_FLAGS
from raee_serve.evaluation.server_process import running_server
from raee_serve.evaluation.summaries import Part, ask_part, calibrated
from raee_serve.evaluation.summary_report import results
from raee_serve.evaluation.summary_turns import FULL_DEPTH, Kept, Row
from raee_serve.exits.choice import DEFAULT_K, Choice
from raee_serve.exits.replay import BUDGETS
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import load_examples
from raee_serve.tasks.registry import get_task
from tests.server.conftest import MODEL, NUM_LAYERS

pytestmark = pytest.mark.server

ROWS = [
    FULL_DEPTH,
    Row("layer 12", "plain exit", {"task": None, "exit_layer": 12}),
    Row("layer 99", "plain exit", {"task": None, "exit_layer": 99}),
]
ARGUMENTS = SimpleNamespace(max_tokens=16, concurrency=4)


def test_rows_are_asked_once_and_what_is_refused_is_left_out(served, tmp_path, capsys):
    task = get_task("demo_summary")
    examples = {task.name: load_examples(task, "test")[:4]}
    part = Part(MODEL, str(served.table), (task,), examples)
    kept = Kept(tmp_path / "kept.jsonl", {})
    taken = asyncio.run(ask_part(ARGUMENTS, part, served.url, {task.name: ROWS}, kept))[task.name]
    assert [row.name for row in taken] == ["full depth", "layer 12"]
    assert "no row 'layer 99'" in capsys.readouterr().out
    assert [(turn.row, len(turn.answers)) for turn in kept.turns] == [
        ("full depth", 4),
        ("layer 12", 4),
    ]

    asyncio.run(
        ask_part(ARGUMENTS, part, served.url, {task.name: ROWS}, Kept(tmp_path / "kept.jsonl", {}))
    )
    assert Kept(tmp_path / "kept.jsonl", {}).turns == kept.turns

    full, early = results(taken, kept.turns, [str(e.gold) for e in examples[task.name]])
    assert full.depth == 1 and early.depth == 12 / NUM_LAYERS
    assert full.rougeL > early.rougeL
    assert full.reasons == early.reasons == {"override": 4}
    assert 1 <= full.answer_tokens <= 16 < full.tokens_per_s


TASK = get_task("demo_summary")
DOCUMENTS = 2


@pytest.fixture(scope="module")
def table(tmp_path_factory, smollm2, minilm) -> str:
    uri = str(tmp_path_factory.mktemp("tables") / "summaries")
    build = ["build", "--model", MODEL, "--table", uri, "--limit", "12", "--task", TASK.name]
    assert main(build) == 0
    return uri


@pytest.fixture(scope="module")
def url(table):
    with running_server(MODEL, ["--table", table, *PATIENCE_FLAGS, *LENGTH_FLAGS]) as url:
        yield url


def test_budgets_of_an_evaluation_are_what_answers_keep(url, table, tmp_path):
    opened = ExitTable.open(table)
    unseen = {TASK.name: unseen_documents(opened, TASK, None, DOCUMENTS)}
    part = Part(MODEL, table, (TASK,), {})
    args = SimpleNamespace(
        out=tmp_path,
        budgets=[0.51, 2.0],
        limit=DOCUMENTS,
        words=400,
        max_tokens=16,
        concurrency=2,
        calibrate=DOCUMENTS,
    )
    found = asyncio.run(calibrated(args, part, url, opened, unseen))[TASK.name]
    answers = (tmp_path / f"{MODEL}.calibration.jsonl").read_bytes()
    again = asyncio.run(calibrated(args, part, url, opened, unseen))[TASK.name]
    assert found[0.51].budget in BUDGETS
    assert found[2.0] is None  # twice full depth's: no exit is to be taken
    assert (tmp_path / f"{MODEL}.calibration.jsonl").read_bytes() == answers and again == found
    args.calibrate, args.budgets, args.out = 0, [0.51], tmp_path / "uncalibrated"
    asked = asyncio.run(calibrated(args, part, url, opened, {TASK.name: []}))
    assert asked == {TASK.name: {0.51: Choice(DEFAULT_K["free-text"], 0.51)}}


def test_a_budget_is_chosen_by_answers(url, table, capsys):
    """Last, for what it stores changes the table."""
    command = ["calibrate", "--table", table, "--task", TASK.name, "--budget", "depth<=1"]
    command += ["--generate", str(DOCUMENTS), "--model", MODEL, "--base-url", url]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"{DOCUMENTS} documents that the table lacks" in printed
    assert len([line for line in printed.splitlines() if ", 24 neighbours" in line]) > 1
    assert ExitTable.open(table).metadata.choices[TASK.name].budget in BUDGETS
