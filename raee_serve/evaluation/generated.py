"""What quality budgets keep in text that a backbone goes on with by itself, by ROUGE-L."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from scipy.optimize import isotonic_regression

from raee_serve.errors import TaskError
from raee_serve.evaluation.asking import SUMMARY_TOKENS, asker
from raee_serve.evaluation.run import LENGTH_FLAGS, OWN_SERVER_FLAGS
from raee_serve.evaluation.server_process import running_server
from raee_serve.evaluation.summaries import SEED, answer_settings, shortened
from raee_serve.evaluation.summary_report import RowResult, results
from raee_serve.evaluation.summary_turns import Kept, accepted, ask_all, rows_of
from raee_serve.retrieval.aggregate import (
    DEFAULT_FRACTION,
    DEFAULT_VOTE_WEIGHT,
    QUALITY,
    QUALITY_RULE,
)
from raee_serve.retrieval.leave_one_out import Outcome
from raee_serve.table.datasets import Example, shuffled_examples
from raee_serve.table.schema import RuleChoice, row_id
from raee_serve.table.store import ExitTable
from raee_serve.table.task import Task

QUALITIES = (0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85)
CONCURRENCY = 16


def generated_outcomes(
    model: str, table: ExitTable, task: Task, examples: Sequence[Example], base_url: str | None
) -> list[Outcome]:
    """One outcome for each of QUALITIES, deepest first; `accuracy` is the share of full depth's
    ROUGE-L that greedy answers to the examples keep.

    Answers are noisy, so shares are fitted that fall as the budgets do (isotonic regression).
    base_url: of a raee-serve of that model and table; None starts one. Raises ServerStartError.
    """
    flags = ["--table", table.uri, *OWN_SERVER_FLAGS, *LENGTH_FLAGS]
    with nullcontext(base_url) if base_url else running_server(model, flags) as url:
        found = asyncio.run(_answered(url, model, task, examples))
    kept = isotonic_regression([row.kept for row in found], increasing=False).x
    return [
        Outcome(_choice(quality), float(share), row.depth)
        for quality, share, row in zip(QUALITIES, kept, found, strict=True)
    ]


def unseen_documents(
    table: ExitTable, task: Task, data: str | None, documents: int
) -> list[Example]:
    """The next training documents after those that the table's rows were made of, shortened.

    Raises TaskError if there are not so many.
    """
    known = set(table.rows(task.name, vectors=False).ids)
    unseen = [
        example
        for example in shuffled_examples(task, "train", data, SEED)
        if row_id(task.name, example.text, example.gold) not in known
    ]
    if len(unseen) < documents:
        raise TaskError(
            f"task {task.name} has {len(unseen)} training documents that {table.uri} lacks, "
            f"{documents} are asked for"
        )
    return shortened(unseen[:documents])


async def _answered(
    url: str, model: str, task: Task, examples: Sequence[Example]
) -> list[RowResult]:
    """One result for each of QUALITIES."""
    server = asker(url, model, answer_settings(task, SUMMARY_TOKENS))
    rows = await accepted(server, task, examples[0].text, rows_of([], QUALITIES))
    with tempfile.TemporaryDirectory() as scratch:
        kept = Kept(Path(scratch) / "answers.jsonl", {})
        await ask_all(server, task, examples, rows, kept, CONCURRENCY)
    return results(rows, kept.turns, [str(example.gold) for example in examples])[1:]


def _choice(quality: float) -> RuleChoice:
    return RuleChoice(QUALITY, QUALITY_RULE.k, DEFAULT_FRACTION, DEFAULT_VOTE_WEIGHT, quality)
