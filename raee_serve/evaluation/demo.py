"""`python -m raee_serve.evaluation.demo`: build tables, serve, ask and evaluate two real models.

Minutes on two cores; only what is installed is used, and the data directory where there is one.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raee_serve.checkpoints import resolve_backbone
from raee_serve.evaluation.asking import Answer, Asker, asker
from raee_serve.evaluation.report import TaskResult, as_json, as_table
from raee_serve.evaluation.run import (
    LENGTH_FLAGS,
    OWN_SERVER_FLAGS,
    WARM_UP,
    evaluate,
    full_depth_of,
    shuffled_rows,
)
from raee_serve.evaluation.server_process import running_server
from raee_serve.tasks.datasets import DEFAULT_ROOT, Example
from raee_serve.tasks.registry import get_task
from raee_serve.tasks.task import Task

TABLE_ROWS, EVAL_ROWS, SHOWN = 300, 60, 2
"""At most, a task: rows built, rows evaluated, prompts whose answers are printed."""
SEED = 0
CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class Part:
    """One backbone of the demo. tasks: from shipped data. extra: where the data directory is."""

    backbone: str
    family: str
    tasks: tuple[str, ...]
    extra: tuple[str, ...] = ("sst2",)


PARTS = (
    Part("smollm2-135m", "Llama", ("demo_chat_sentiment", "demo_summary")),
    Part("gemma3-270m", "Gemma", ("demo_sentiment",)),
)


def main() -> None:
    start = time.perf_counter()
    results: dict[str, TaskResult] = {}
    for part in PARTS:
        say(f"{part.backbone}, a {part.family} model")
        results |= {f"{part.backbone}/{name}": result for name, result in run_part(part).items()}
    say(f"Quality, depth and speed (the whole demo took {time.perf_counter() - start:.0f} s)")
    print(as_table(results))
    print(as_json(results))
    for name, result in results.items():
        print(f"{name}: {verdict(result)}", flush=True)


def run_part(part: Part) -> dict[str, TaskResult]:
    """Build a table for the backbone, serve it, print a few answers, evaluate."""
    data = data_root()
    names = part.tasks + (part.extra if data else ())
    tasks = [get_task(name) for name in names]
    examples = {task.name: shuffled_rows(task, data, EVAL_ROWS, SEED) for task in tasks}
    resolve_backbone(part.backbone)  # converts it the first time, before the clock of the build
    with tempfile.TemporaryDirectory(prefix="raee-demo-") as scratch:
        table = str(Path(scratch) / "table")
        build_table(part.backbone, names, data, table)
        print(f"$ raee-serve serve {part.backbone} --table {table}", flush=True)
        flags = ["--table", table, *OWN_SERVER_FLAGS, *LENGTH_FLAGS]
        with running_server(part.backbone, flags) as url:
            return asyncio.run(ask_and_evaluate(asker(url, part.backbone), tasks, examples))


def build_table(backbone: str, tasks: Sequence[str], data: str | None, table: str) -> None:
    """Run `raee-serve build`, its progress on the terminal."""
    flags = ["--model", backbone, "--table", table, "--limit", str(TABLE_ROWS)]
    flags += [part for name in tasks for part in ("--task", name)]
    flags += ["--data", data] if data else []
    print(f"$ raee-serve build {' '.join(flags)}", flush=True)
    subprocess.run([sys.executable, "-m", "raee_serve.cli", "build", *flags], check=True)


async def ask_and_evaluate(
    server: Asker, tasks: Sequence[Task], examples: dict[str, list[Example]]
) -> dict[str, TaskResult]:
    for task in tasks:
        say(f"{task.name}: {task.prompt.template!r}")
        full_depth = await full_depth_of(server, task)
        for options in ({}, full_depth):
            await server.ask_all(task, WARM_UP, options, CONCURRENCY)
        for example in examples[task.name][:SHOWN]:
            await show(server, task, example, full_depth)
    return await evaluate(server, tasks, examples, {}, CONCURRENCY)


async def show(
    server: Asker, task: Task, example: Example, full_depth: Mapping[str, object]
) -> None:
    """Print one text's answers at retrieved and at full depth, side by side."""
    gold = example.gold if isinstance(example.gold, str) else task.labels[example.gold]
    print(f"\n  {shortened(example.text)}\n    gold       {shortened(gold)}")
    retrieved = await server.ask(task, example.text, {})
    full = await server.ask(task, example.text, full_depth)
    for name, answer in (("retrieved", retrieved), ("full depth", full)):
        print(f"    {name:<10} {shortened(answer.text.strip())}   [{how(answer)}]", flush=True)


def how(answer: Answer) -> str:
    depth = f"{answer.exit_layer} of {answer.num_layers} layers, {answer.reason}"
    near = "" if answer.distance == "-" else f", nearest row at {answer.distance}"
    return f"{depth}{near}, {answer.latency_s * 1000:.0f} ms"


def verdict(result: TaskResult) -> str:
    """Whether a task is shallower than full depth, at least as right, and faster."""
    shallower = "shallower" if result.mean_exit_layer < result.num_layers else "not shallower"
    right = "at least as right" if result.raee_accuracy >= result.full_accuracy else "less right"
    faster = "faster" if result.raee_rps > result.full_rps else "not faster"
    ours, full = result.raee_accuracy, result.full_accuracy
    return (
        f"{result.mean_exit_layer:.1f} of {result.num_layers} layers ({shallower}), "
        f"{result.metric} {ours:.3f} against {full:.3f} at full depth ({right}), "
        f"{result.raee_rps:.1f} against {result.full_rps:.1f} requests/s ({faster})"
    )


def data_root() -> str | None:
    """The data directory, if there is one: RAEE_DATA."""
    return DEFAULT_ROOT if DEFAULT_ROOT and Path(DEFAULT_ROOT).is_dir() else None


def shortened(text: str, width: int = 150) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
