"""`raee-serve eval`: tasks at full depth and at retrieved depths, through the server or offline."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from openai import BadRequestError

from raee_serve.errors import RaeeError
from raee_serve.evaluation.asking import Asker, asker
from raee_serve.evaluation.report import TaskResult, as_json, as_table
from raee_serve.evaluation.server_process import running_server
from raee_serve.tasks.datasets import Example, add_data_argument, shuffled_examples
from raee_serve.tasks.registry import add_task_argument, get_tasks
from raee_serve.tasks.task import Task

PATIENT_TIMEOUT_MS = 60_000
PATIENCE_FLAGS = ("--lookup-timeout-ms", str(PATIENT_TIMEOUT_MS))
"""So that quality is not a matter of time-outs."""
OWN_SERVER_FLAGS = (*PATIENCE_FLAGS, "--no-enable-prefix-caching")
"""And so that the second run gains nothing from the first."""
LENGTH_FLAGS = ("--max-model-len", "2048")
"""Long enough for all tasks, and less memory than the models' own lengths take."""
WARM_UP = [f"A text to warm up with, number {n}." for n in range(8)]
"""Asked about before anything is timed, at full and at retrieved depth each."""

DESCRIPTION = """Ask a server about a task's test rows, once at full depth and once at retrieved
depths, and compare quality, depth and speed. Starts a server of its own unless --base-url names
one; flags not listed here go to that server. With --offline there is no server: the rows are probed
here, and several budgets are compared with the paper's rule, with full depth, and with baselines
that decide nothing or need no language model. Of the server's flags --max-distance, --encoder,
--shortcuts-file and --exit-points apply there. The last line is one JSON object."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.allow_abbrev = False
    parser.add_argument("--model", required=True, help="backbone, or the model name at --base-url")
    parser.add_argument("--table", metavar="DIR", help="exit table; not needed with --base-url")
    add_task_argument(parser)
    add_data_argument(parser)
    parser.add_argument("--limit", type=_positive, metavar="N", help="test rows a task")
    parser.add_argument("--base-url", metavar="URL", help="a running raee-serve")
    parser.add_argument("--offline", action="store_true", help="without a server")
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        metavar="B",
        help="shares of the best exit's expected quality to keep, of which a server is asked for "
        "one (default: its own; with --offline 0.9 0.95 0.98 0.99)",
    )
    parser.add_argument("--k", type=int, help="neighbours; the server's default if not given")
    parser.add_argument("--concurrency", type=_positive, default=32, help="default: 32")
    parser.add_argument("--seed", type=int, default=0, help="of the row shuffle (default: 0)")
    parser.add_argument("--json", action="store_true", help="leave out the tables")


def run(args: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Evaluate and print. Raises RaeeError for unknown tasks, missing data or a failing server."""
    tasks = get_tasks(args.task)
    examples = {task.name: shuffled_rows(task, args.data, args.limit, args.seed) for task in tasks}
    if args.offline:
        from raee_serve.evaluation import offline

        offline.run(args, rest, tasks, examples)
        return
    raee = {"budget": _only_one(args.budgets), "k": args.k}
    raee = {key: value for key, value in raee.items() if value is not None}
    with _server(args, rest) as url:
        results = asyncio.run(
            evaluate(asker(url, args.model), tasks, examples, raee, args.concurrency)
        )
    if not args.json:
        print(as_table(results))
    print(as_json(results), flush=True)


def shuffled_rows(task: Task, root: str | None, limit: int | None, seed: int) -> list[Example]:
    """The first `limit` rows of a seeded shuffle of the task's test split."""
    return shuffled_examples(task, "test", root, seed)[:limit]


async def evaluate(
    server: Asker,
    tasks: Sequence[Task],
    examples: dict[str, list[Example]],
    raee: dict[str, Any],
    concurrency: int,
) -> dict[str, TaskResult]:
    """Each task's result, in task order. `raee` (budget, k) applies to the retrieved run."""
    results = {}
    for task in tasks:
        rows = examples[task.name]
        texts, golds = [row.text for row in rows], [row.gold for row in rows]
        full_depth = await full_depth_of(server, task)
        for options in (full_depth, raee):
            await server.ask_all(task, WARM_UP, options, concurrency)
        full = await server.ask_all(task, texts, full_depth, concurrency)
        retrieved = await server.ask_all(task, texts, raee, concurrency)
        results[task.name] = TaskResult.of(task, golds, full, retrieved)
        print(f"raee-serve: {task.name}: {len(rows)} rows asked twice", flush=True)
    return results


async def full_depth_of(server: Asker, task: Task) -> dict[str, Any]:
    """The options of requests for full depth through the LM head, as without a table.

    Labels that it cannot tell apart are answered by the last layer's probe instead.
    """
    through_head = {"exit_layer": "full", "head": "plain"}
    if task.kind == "free-text":
        return {"exit_layer": "full"}
    try:
        await server.ask(task, WARM_UP[0], through_head)
    except BadRequestError:
        return {"exit_layer": "full"}
    return through_head


def _only_one(budgets: Sequence[float] | None) -> float | None:
    if budgets and len(budgets) > 1:
        raise RaeeError(f"--budgets names {len(budgets)}, which only --offline can compare")
    return budgets[0] if budgets else None


def _server(args: argparse.Namespace, rest: Sequence[str]) -> AbstractContextManager[str]:
    if args.base_url:
        if rest:
            raise RaeeError(f"flags {' '.join(rest)} are for a server that --base-url replaces")
        return nullcontext(args.base_url)
    if not args.table:
        raise RaeeError("give --table DIR, or --base-url URL of a running raee-serve")
    print(
        f"raee-serve: starting a server with a look-up time-out of {PATIENT_TIMEOUT_MS / 1000:g} s "
        "(so that quality is not a matter of time-outs) and without prefix caching (so that the "
        "second run gains nothing from the first)",
        flush=True,
    )
    return running_server(args.model, ["--table", args.table, *OWN_SERVER_FLAGS, *rest])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value
