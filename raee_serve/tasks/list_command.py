"""`raee-serve task list`: the shipped tasks, and those of task files."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import Any

from raee_serve.table.schema import shortened
from raee_serve.tasks.registry import TASKS, get_tasks
from raee_serve.tasks.task import Task

WIDTH = 60


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", nargs="*", metavar="FILE", help="task files to list too")
    parser.add_argument("--json", action="store_true", help="print one JSON object, by name")


def run(args: Namespace) -> None:
    """Raises TaskError for a file that describes no task."""
    tasks = [*TASKS.values(), *get_tasks(args.file)]
    if args.json:
        print(json.dumps({task.name: described(task) for task in tasks}))
        return
    print(f"{'name':20} {'kind':10} {'shipped':8} labels; data")
    for task in tasks:
        found = described(task)
        labels = shortened(task.labels) or "free text"
        labels = labels if len(labels) <= WIDTH else labels[: WIDTH - 3] + "..."
        shipped = "yes" if found["shipped"] else "no"
        print(f"{task.name:20} {task.kind:10} {shipped:8} {labels}; {' or '.join(found['data'])}")


def described(task: Task) -> dict[str, Any]:
    """data: where its rows are, with ROOT for --data, or a hub data set."""
    return {
        "kind": task.kind,
        "shipped": TASKS.get(task.name) is task,
        "labels": list(task.labels),
        "data": [str(source) for source in (task.data, task.hub) if source is not None],
    }
