"""What answers say of budgets, by answers that are made up."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from raee_serve.errors import RaeeError, TaskError
from raee_serve.evaluation.asking import Answer, Asker
from raee_serve.evaluation.generated import differing_choices, outcomes_of_answers
from raee_serve.evaluation.summary_turns import Kept
from raee_serve.exits.choice import Choice
from raee_serve.tasks.datasets import Example
from raee_serve.tasks.registry import get_task
from tests.unit.exit_tables import free_text_rows, new_table, put_free_text

pytestmark = pytest.mark.unit

TASK = get_task("demo_summary")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
EXAMPLES = [Example(f"text {n}", " ".join(WORDS)) for n in range(3)]
CHOICES = [Choice(5, budget) for budget in (0.99, 0.9, 0.5)]


@dataclass(frozen=True)
class Scripted(Asker):
    """Says as many of the reference's words as are known for a budget; all of them without."""

    known: Mapping[float, int] = field(default_factory=dict)
    asked: list[Mapping] = field(default_factory=list)

    async def ask(self, task, text, raee):
        self.asked.append(raee)
        words = self.known.get(raee.get("budget"), len(WORDS))
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
    assert {"k": 5, "budget": 0.9, "explain": True} in server.asked


def test_a_row_that_is_refused_is_named(tmp_path, monkeypatch):
    async def accepts_two(server, task, text, rows):
        return rows[:2]

    monkeypatch.setattr("raee_serve.evaluation.generated.accepted", accepts_two)
    with pytest.raises(RaeeError, match=r"the server refuses budget 0\.9, budget 0\.5"):
        outcomes(Scripted(None, "m"), tmp_path)


def free_text_table(uri, quality):
    """quality: [rows, layers] of the plain head, at all four layers."""
    table = new_table(uri)
    put_free_text(table, TASK.name, free_text_rows(quality), layers=(1, 2, 3, 4))
    return table


def test_budgets_that_lead_to_other_layers_are_tried_the_deepest_first(uri):
    table = free_text_table(uri, [[0.3, 0.72, 0.93, 1.0]] * 30)
    choices = differing_choices(table, TASK)
    assert [choice.budget for choice in choices] == [1.0, 0.92, 0.7]
    assert {choice.k for choice in choices} == {24}
    table.put_choices({TASK.name: Choice(12, 0.9)})
    assert {choice.k for choice in differing_choices(table, TASK)} == {12}


def test_one_row_tells_nothing_of_itself(uri):
    table = free_text_table(uri, [[0.3, 0.7, 0.9, 1.0]])
    with pytest.raises(
        TaskError, match="demo_summary has 1 rows in the table; at least 2 are needed"
    ):
        differing_choices(table, TASK)
