"""What budgets of quality keep in text that a backbone goes on with by itself, by ROUGE-L."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from openai import OpenAIError
from scipy.optimize import isotonic_regression

from raee_serve.errors import RaeeError
from raee_serve.evaluation.asking import SUMMARY_TOKENS, Asker, asker
from raee_serve.evaluation.documents import answer_settings
from raee_serve.evaluation.run import LENGTH_FLAGS, PATIENCE_FLAGS
from raee_serve.evaluation.server_process import running_server
from raee_serve.evaluation.summary_report import results
from raee_serve.evaluation.summary_turns import Kept, accepted, ask_all, rows_of
from raee_serve.exits.choice import Choice
from raee_serve.exits.replay import BUDGETS, Outcome
from raee_serve.retrieval.replayed import replay_of
from raee_serve.retrieval.task_index import choice_of
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import Example
from raee_serve.tasks.task import Task

CONCURRENCY = 16


def generated_outcomes(
    model: str, table: ExitTable, task: Task, examples: Sequence[Example], base_url: str | None
) -> list[Outcome]:
    """As `outcomes_of_answers`, of a raee-serve of that model and table.

    base_url: None starts one. Raises RaeeError for a server that does not start or answer.
    """
    choices = differing_choices(table, task)
    flags = ["--table", table.uri, *PATIENCE_FLAGS, *LENGTH_FLAGS]
    with (
        nullcontext(base_url) if base_url else running_server(model, flags) as url,
        tempfile.TemporaryDirectory() as scratch,
    ):
        server = asker(url, model, answer_settings(task, SUMMARY_TOKENS))
        kept = Kept(Path(scratch) / "answers.jsonl", {})
        asked = outcomes_of_answers(server, choices, task, examples, kept, CONCURRENCY)
        try:
            return asyncio.run(asked)
        except OpenAIError as error:
            raise RaeeError(f"{url} does not answer for {model}: {error}") from error


async def outcomes_of_answers(
    server: Asker,
    choices: Sequence[Choice],
    task: Task,
    examples: Sequence[Example],
    kept: Kept,
    at: int,
) -> list[Outcome]:
    """One outcome for each choice; `accuracy` is the share of full depth's ROUGE-L that greedy
    answers to the examples keep, asked for `at` at once. The depth of what looped and was begun
    again is that of both runs.

    choices: deepest first. Answers are noisy, so shares are fitted that fall with the depth
    (isotonic regression). Raises RaeeError where the server refuses any of them.
    """
    asked = rows_of([], {choice.budget: choice for choice in choices})
    rows = await accepted(server, task, examples[0].text, asked)
    if refused := [row.name for row in asked if row not in rows]:
        raise RaeeError(f"task {task.name}: the server refuses {', '.join(refused)}")
    await ask_all(server, task, examples, rows, kept, at)
    turns = [turn for turn in kept.turns if turn.task == task.name]
    found = results(rows, turns, [str(example.gold) for example in examples])[1:]
    shares = isotonic_regression([row.kept for row in found], increasing=False).x
    return [
        Outcome(choice, float(share), row.depth)
        for choice, share, row in zip(choices, shares, found, strict=True)
    ]


def said(outcomes: Sequence[Outcome], budgets: Mapping[float, Choice | None]) -> str:
    """What was found, and what is asked for budgets."""
    tried = "; ".join(
        f"budget {o.choice.budget:g} keeps {o.accuracy:.3f} at depth {o.depth:.3f}"
        for o in outcomes
    )
    made = ", ".join(
        f"{choice.budget if choice else 'full depth'} to keep {budget:g}"
        for budget, choice in budgets.items()
    )
    return f"{tried}. Asked for: {made}"


def differing_choices(table: ExitTable, task: Task) -> list[Choice]:
    """Budgets of which no two take the table's own rows to the same layer, on average; the deepest
    first.

    Raises TableError for unusable rows, TaskError for too few.
    """
    stored = choice_of(table.metadata, table.metadata.tasks[task.name])
    rows = replay_of(table, task.name)
    by_layer: dict[int, Choice] = {}
    for outcome in rows.outcomes([Choice(stored.k, budget) for budget in BUDGETS]):
        by_layer.setdefault(round(outcome.depth * rows.num_layers), outcome.choice)
    return [by_layer[layer] for layer in sorted(by_layer, reverse=True)]
