"""`python -m raee_serve.evaluation.summaries --out DIR`: what early exits do to summaries.

Two backbones summarise news articles greedily, SmolLM2-135M-Instruct in a chat and Gemma-3-270M
after two examples: at full depth, at fixed exits plain and by shortcut, and at exits retrieved
under budgets, which answers to training documents calibrate. For each: ROUGE against the
references, paired with full depth's, and speed, all on one server a backbone. An interrupted run
goes on where it was; --out holds the answers (MODEL.jsonl, MODEL.calibration.jsonl), and in the end
summaries.json, summaries.md and summaries.png, which keep what they say of other backbones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raee_serve.checkpoints import resolve_backbone
from raee_serve.errors import RaeeError, TaskError
from raee_serve.evaluation.asking import asker
from raee_serve.evaluation.documents import (
    WORDS,
    answer_settings,
    documents_to_test,
    unseen_documents,
)
from raee_serve.evaluation.generated import (
    differing_choices,
    outcomes_of_answers,
    said,
)
from raee_serve.evaluation.run import LENGTH_FLAGS, PATIENCE_FLAGS
from raee_serve.evaluation.server_process import running_server
from raee_serve.evaluation.summary_report import (
    RowResult,
    as_fields,
    as_markdown,
    draw,
    published,
    results,
)
from raee_serve.evaluation.summary_turns import Kept, Row, accepted, ask_all, rows_of
from raee_serve.exits.choice import Choice
from raee_serve.exits.replay import shallowest_with
from raee_serve.retrieval.task_index import choice_of
from raee_serve.table.schema import TableMetadata
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import Example, add_data_argument, add_words_argument
from raee_serve.tasks.registry import get_task
from raee_serve.tasks.task import Task

TASKS = {
    "smollm2-135m": ("cnndm_chat", "xsum_chat"),
    "gemma3-270m": ("cnndm_shots", "xsum_shots"),
}
"""The tasks of each backbone that are summarised unless others are named."""
BUDGETS = (0.98, 0.95, 0.8)
"""Shares of full depth's quality that retrieved exits are to keep."""
Found = dict[str, list[RowResult]]
"""By task."""


@dataclass(frozen=True, slots=True)
class Part:
    """One backbone's share of the work. examples: of each task, documents already cut."""

    model: str
    table: str
    tasks: tuple[Task, ...]
    examples: Mapping[str, Sequence[Example]]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        parts = [part_of(args, model) for model in args.model or TASKS]
        found = {part.model: summarise(args, part) for part in parts}
        written = write(found, args.out)
    except RaeeError as error:
        raise SystemExit(f"summaries: error: {error}") from error
    print(written, flush=True)


def part_of(args: argparse.Namespace, model: str) -> Part:
    """Raises TaskError for tasks that are no summaries, or whose documents are not there."""
    if args.limit < 1 or args.calibrate < 0:
        raise TaskError(
            f"--limit {args.limit} must be at least 1, --calibrate {args.calibrate} at least 0"
        )
    names = args.task or TASKS.get(model)
    if not names:
        raise TaskError(f"name tasks for {model} (--task); only {', '.join(TASKS)} have defaults")
    tasks = tuple(get_task(name) for name in names)
    for task in tasks:
        if task.kind != "free-text":
            raise TaskError(f"task {task.name} has labels for answers; allowed: free text")
    examples = {
        task.name: documents_to_test(task, args.data, args.limit, words=args.words)
        for task in tasks
    }
    return Part(model, str((args.tables or args.out / "tables") / model), tasks, examples)


def summarise(args: argparse.Namespace, part: Part) -> Found:
    """Ask for what is not kept yet, and score all of it."""
    build_table(args, part)
    table = ExitTable.open(part.table)
    exits = args.exits or known_exits(table.metadata, part.tasks)
    kept = Kept(args.out / f"{part.model}.jsonl", settings_of(args, part, table))
    unseen = {
        task.name: unseen_documents(table, task, args.data, args.calibrate, args.words)
        for task in part.tasks
    }
    flags = ["--table", part.table, *PATIENCE_FLAGS, *LENGTH_FLAGS]
    with running_server(part.model, flags) as url:
        budgets = asyncio.run(calibrated(args, part, url, table, unseen))
        rows = {task: rows_of(exits, own) for task, own in budgets.items()}
        taken = asyncio.run(ask_part(args, part, url, rows, kept))
    return {
        task.name: results(
            taken[task.name],
            [turn for turn in kept.turns if turn.task == task.name],
            [str(example.gold) for example in part.examples[task.name]],
        )
        for task in part.tasks
    }


def settings_of(args: argparse.Namespace, part: Part, table: ExitTable) -> dict[str, Any]:
    """What answers depend on."""
    named = ("limit", "words", "max_tokens", "concurrency", "calibrate")
    return {
        "model": part.model,
        "table": table.state,
        "tasks": {task.name: task.version for task in part.tasks},
        **{name: getattr(args, name) for name in named},
    }


async def calibrated(
    args: argparse.Namespace,
    part: Part,
    url: str,
    table: ExitTable,
    unseen: Mapping[str, Sequence[Example]],
) -> dict[str, dict[float, Choice | None]]:
    """By task: how exits are chosen, by the share of ROUGE-L that they are to keep.

    unseen: by task, the documents whose answers say it; without any, the shares are the budgets.
    None for a share that no exit keeps.
    """
    kept = Kept(args.out / f"{part.model}.calibration.jsonl", settings_of(args, part, table))
    found: dict[str, dict[float, Choice | None]] = {}
    for task in part.tasks:
        examples = unseen[task.name]
        if not examples:
            k = choice_of(table.metadata, table.metadata.tasks[task.name]).k
            found[task.name] = {budget: Choice(k, budget) for budget in args.budgets}
            continue
        server = asker(url, part.model, answer_settings(task, args.max_tokens))
        choices = differing_choices(table, task)
        outcomes = await outcomes_of_answers(
            server, choices, task, examples, kept, args.concurrency
        )
        chosen = {budget: shallowest_with(outcomes, budget) for budget in args.budgets}
        found[task.name] = {budget: own and own.choice for budget, own in chosen.items()}
        print(f"raee-serve: {task.name}: {said(outcomes, found[task.name])}", flush=True)
    return found


async def ask_part(
    args: argparse.Namespace, part: Part, url: str, rows: Mapping[str, Sequence[Row]], kept: Kept
) -> dict[str, list[Row]]:
    """By task, those of its rows that the server took; all their answers are kept then."""
    taken: dict[str, list[Row]] = {}
    for task in part.tasks:
        examples = part.examples[task.name]
        server = asker(url, part.model, answer_settings(task, args.max_tokens))
        taken[task.name] = await accepted(server, task, examples[0].text, rows[task.name])
        await ask_all(server, task, examples, taken[task.name], kept, args.concurrency)
    return taken


def known_exits(metadata: TableMetadata, tasks: Sequence[Task]) -> list[int]:
    """Layers before the last one with shortcuts, or else those at which the tasks were probed."""
    entries = [metadata.tasks[task.name] for task in tasks]
    layers = {layer for entry in entries for layer in entry.shortcut_layers}
    layers = layers or {layer for entry in entries for layer in entry.layers}
    return sorted(layers - {metadata.backbone.num_layers})


def build_table(args: argparse.Namespace, part: Part) -> None:
    """Of the part's tasks, with shortcuts, unless there is one."""
    if Path(part.table).is_dir():
        return
    resolve_backbone(part.model)  # converts it the first time
    tasks = [flag for task in part.tasks for flag in ("--task", task.name)]
    command = ["build", "--model", part.model, *tasks, "--shortcuts", "--table", part.table]
    command += ["--data", args.data, "--limit", str(args.table_rows), "--words", str(args.words)]
    print(f"$ raee-serve {' '.join(command)}", flush=True)
    if subprocess.run([sys.executable, "-m", "raee_serve.cli", *command], check=False).returncode:
        raise RaeeError(f"no table for {part.model}")


def write(found: Mapping[str, Found], out: Path) -> str:
    """Into `out`, beside what is there of other backbones; table and JSON line of them all."""
    found = {**written_before(out / "summaries.json"), **found}
    models = {
        model: {
            task: {"published_rougeL": published(task), "rows": [as_fields(row) for row in rows]}
            for task, rows in tasks.items()
        }
        for model, tasks in found.items()
    }
    line = json.dumps({"models": models})
    table = as_markdown(found)
    (out / "summaries.json").write_text(line + "\n", encoding="utf-8")
    (out / "summaries.md").write_text(table, encoding="utf-8")
    draw(found, out / "summaries.png")
    return f"{table}\n{line}"


def written_before(path: Path) -> dict[str, Found]:
    """By backbone, of an earlier run."""
    if not path.exists():
        return {}
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    return {
        model: {task: [RowResult(**row) for row in of["rows"]] for task, of in tasks.items()}
        for model, tasks in models.items()
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", action="append", help=f"default: {' and '.join(TASKS)}")
    parser.add_argument("--task", action="append", help="in place of the model's default tasks")
    add_data_argument(parser)
    parser.add_argument(
        "--tables",
        type=Path,
        metavar="DIR",
        help="DIR/MODEL is the model's exit table, built unless it is there (default: in --out)",
    )
    parser.add_argument(
        "--table-rows", type=int, default=200, metavar="N", help="a task (default: 200)"
    )
    parser.add_argument(
        "--limit", type=int, default=200, metavar="N", help="test documents a task (default: 200)"
    )
    parser.add_argument(
        "--calibrate",
        type=int,
        default=100,
        metavar="N",
        help="training documents a task that the table lacks, by whose answers --budgets become "
        "what requests ask for; 0 asks for the budgets as they are (default: 100)",
    )
    add_words_argument(parser, WORDS)
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument(
        "--exits",
        type=int,
        nargs="+",
        metavar="N",
        help="fixed exit layers (default: those that have shortcuts)",
    )
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="*",
        default=list(BUDGETS),
        metavar="Q",
        help=f"shares of full depth's quality to keep (default: {' '.join(map(str, BUDGETS))})",
    )
    parser.add_argument("--concurrency", type=int, default=16, help="default: 16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
