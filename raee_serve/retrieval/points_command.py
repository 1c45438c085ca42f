"""`raee-serve table points`: at which layers to capture CUDA graphs, and what that costs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections import Counter
from dataclasses import dataclass

import numpy as np

from raee_serve.errors import RaeeError, TableError
from raee_serve.exit_points import MAX_POINTS, choose_points, extra_layers
from raee_serve.retrieval.free_text import FreeTextLeaveOneOut
from raee_serve.retrieval.leave_one_out import LeaveOneOut
from raee_serve.retrieval.left_out import left_out
from raee_serve.retrieval.task_index import choice_of
from raee_serve.table.schema import RuleChoice
from raee_serve.table.store import ExitTable

DESCRIPTION = """Choose exit points for `serve --exit-points`: the layers between which decoding
runs from CUDA graphs. Each row is asked as if the table did not hold it; the points are those at
which the rows' exits, rounded up, run the fewest extra layers (a rule that the next point does not
serve takes a later one). Prints accuracy (of free text, the share of full depth's quality that is
kept) and depth with exits at any layer and at the points."""

MAX_ROWS = 2000
"""Rows of a task that are asked, spread over all of them; time grows with their square."""


@dataclass(frozen=True, slots=True)
class TaskExits:
    """One task's rows, to be asked under its own choice."""

    name: str
    rows: LeaveOneOut | FreeTextLeaveOneOut
    choice: RuleChoice


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("table", metavar="DIR")
    parser.add_argument(
        "--count",
        type=int,
        default=MAX_POINTS,
        metavar="N",
        help="most points, full depth among them (default: %(default)s)",
    )


def run(args: Namespace) -> None:
    """Raises TableError for a table that is unusable or holds no task of two rows or more."""
    if args.count < 1:
        raise RaeeError(f"--count is {args.count}; allowed: at least 1")
    tasks, num_layers = _tasks(args.table)
    exits = _exits(tasks)
    points = choose_points(exits, num_layers, args.count)
    print(f"exit points: {','.join(map(str, points))}")
    least = extra_layers(exits, points)
    print(f"extra layers: at least {least:.2f} of {num_layers}, on average")
    print(f"{'':12} {'any layer':>15} {'points':>15}")
    for task in tasks:
        free, limited = (task.rows.outcome(task.choice, p) for p in ((), points))
        told = (f"{o.accuracy:7.3f} {o.depth:7.2f}" for o in (free, limited))
        print(f"{task.name:12} {' '.join(told)}")


def points_named(text: str, table: str | None) -> tuple[int, ...]:
    """What `--exit-points` names: layers, `any` (none), or `auto`, those of the table.

    Raises RaeeError for anything else, and as `run`.
    """
    if text == "any":
        return ()
    if text == "auto" and table is not None:
        tasks, num_layers = _tasks(table)
        return choose_points(_exits(tasks), num_layers)
    layers = [layer.strip() for layer in text.split(",")]
    if not all(layer.isdecimal() for layer in layers):
        raise RaeeError(
            f"--exit-points is {text!r}; allowed: layers like 4,8,16; any; or, with --table, auto"
        )
    return tuple(map(int, layers))


def _exits(tasks: list[TaskExits]) -> Counter[int]:
    """How many rows leave at each layer."""
    return Counter(layer for task in tasks for layer in task.rows.layers(task.choice).tolist())


def _tasks(uri: str) -> tuple[list[TaskExits], int]:
    """Those of two rows or more, and the backbone's number of layers."""
    table = ExitTable.open(uri)
    tasks = [t for name in table.metadata.tasks if (t := task_exits(table, name)) is not None]
    if not tasks:
        raise TableError(f"exit table {uri} holds no task of two rows or more; build it first")
    return tasks, table.metadata.backbone.num_layers


def task_exits(table: ExitTable, name: str) -> TaskExits | None:
    """None for a task of which the table has not two rows."""
    entry = table.metadata.tasks.get(name)
    if entry is None or table.count(name) < 2:
        return None
    rows = table.rows(name)
    kept = rows.at(np.linspace(0, len(rows) - 1, min(len(rows), MAX_ROWS)).astype(int))
    asked = left_out(kept, entry, table.metadata.backbone.num_layers)
    return TaskExits(name, asked, choice_of(table.metadata, entry))
