"""Summaries of the shipped notes through the running server, at several depths."""

import asyncio
from types import SimpleNamespace

import pytest

from raee_serve.evaluation.summaries import Part, ask_part
from raee_serve.evaluation.summary_report import results
from raee_serve.evaluation.summary_turns import FULL_DEPTH, Kept, Row
from raee_serve.table.datasets import load_examples
from raee_serve.table.tasks import get_task
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
