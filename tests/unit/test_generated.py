"""What answers say of budgets, by answers that are made up."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from raee_serve.errors import RaeeError, TaskError
from raee_serve.evaluation.asking import Answer, Asker
from raee_serve.evaluation.generated import differing_choices, outcomes_of_answers
from raee_serve.evaluation.summary_turns import Kept
from raee_serve.retrieval.free_text import quality_choice
from raee_serve.retrieval.leave_one_out import Outcome, shallowest
from raee_serve.table.datasets import Example
from raee_serve.table.schema import RuleChoice, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.table.tasks import get_task
from tests.unit.table_rows import metadata, unit_vectors

pytestmark = pytest.mark.unit

TASK = get_task("demo_summary")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
EXAMPLES = [Example(f"text {n}", " ".join(WORDS)) for n in range(3)]
CHOICES = [quality_choice(quality, k=5) for quality in (0.99, 0.9, 0.5)]


@dataclass(frozen=True)
class Scripted(Asker):
    """Says as many of the reference's words as are known for a quality; all of them without."""

    known: Mapping[float, int] = field(default_factory=dict)
    asked: list[Mapping] = field(default_factory=list)

    async def ask(self, task, text, raee):
        self.asked.append(raee)
        words = self.known.get(raee.get("quality"), len(WORDS))
        return Answer(" ".join(WORDS[:words]), 9, words, words, 10, "retrieved", "-", 0.1)

    async def ask_all(self, task, texts, raee, concurrency):
        return [await self.ask(task, text, raee) for text in texts], 1.0


def outcomes(server, path):
    kept = Kept(path / "answers.jsonl", {})
    return asyncio.run(outcomes_of_answers(server, CHOICES, TASK, EXAMPLES, kept, 2))


def test_shares_fall_with_the_depth_however_noisy_they_are(tmp_path):
    server = Scripted(None, "m", known={0.99: 6, 0.9: 8, 0.5: 4})
    first, second, third = outcomes(server, tmp_path)
    noisy = 2 * 0.6 / 1.6, 2 * 0.8 / 1.8  # ROUGE-L of six, and of eight of ten words
    assert first.accuracy == second.accuracy == pytest.approx(sum(noisy) / 2)
    assert third.accuracy == pytest.approx(2 * 0.4 / 1.4)
    assert [own.choice for own in (first, second, third)] == CHOICES
    assert [own.depth for own in (first, second, third)] == pytest.approx([0.6, 0.8, 0.4])
    assert {"rule": "quality", "k": 5, "quality": 0.9, "explain": True} in server.asked


def test_a_budget_is_kept_at_the_least_depth_or_not_at_all():
    found = [
        Outcome(CHOICES[0], 1.0, 0.9),
        Outcome(CHOICES[1], 0.95, 0.6),
        Outcome(CHOICES[2], 0.8, 0.4),
    ]
    assert [shallowest(found, budget) for budget in (1.01, 0.96, 0.95, 0.5)] == [None, *found]


def test_a_row_that_is_refused_is_named(tmp_path, monkeypatch):
    async def accepts_two(server, task, text, rows):
        return rows[:2]

    monkeypatch.setattr("raee_serve.evaluation.generated.accepted", accepts_two)
    with pytest.raises(RaeeError, match=r"the server refuses quality 0\.9, quality 0\.5"):
        outcomes(Scripted(None, "m"), tmp_path)


def free_text_table(path, quality):
    """quality: [rows, layers] of the plain head, at all four layers."""
    table = ExitTable.open_or_create(str(path / "table"), metadata())
    table.put_task(TaskEntry.of(TASK, (), (1, 2, 3, 4)))
    n, found = len(quality), np.asarray(quality, np.float32)
    ids = [f"{i:032x}" for i in range(n)]
    table.add(TASK.name, TaskRows(ids, unit_vectors(n), None, None, found, found, found))
    return table


def test_thresholds_that_lead_to_other_layers_are_tried_the_deepest_first(tmp_path):
    table = free_text_table(tmp_path, [[0.3, 0.72, 0.93, 1.0]] * 30)
    choices = differing_choices(table, TASK)
    assert [choice.quality for choice in choices] == [0.99, 0.92, 0.7]
    assert {choice.k for choice in choices} == {24}
    table.put_choices({TASK.name: RuleChoice("quality", 12, 0.95, 2.0, quality=0.9)})
    assert {choice.k for choice in differing_choices(table, TASK)} == {12}


def test_one_row_tells_nothing_of_itself(tmp_path):
    table = free_text_table(tmp_path, [[0.3, 0.7, 0.9, 1.0]])
    with pytest.raises(
        TaskError, match="demo_summary has 1 rows in the table; at least 2 are needed"
    ):
        differing_choices(table, TASK)
