"""`raee-serve table points`: at which layers to capture CUDA graphs, and what that costs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections import Counter
from dataclasses import dataclass

from raee_serve.errors import RaeeError, TableError, TaskError
from raee_serve.exit_points import MAX_POINTS, choose_points, extra_layers
from raee_serve.exits.choice import Choice
from raee_serve.exits.replay import Replay
from raee_serve.retrieval.replayed import replay_of
from raee_serve.retrieval.task_index import choice_of
from raee_serve.table.store import ExitTable

DESCRIPTION = """Choose exit points for `serve --exit-points`: the layers between which decoding
runs from CUDA graphs. Each row is asked as if the table did not hold it; the points are those at
which the rows' exits, rounded up, run the fewest extra layers (where an exit at the next point
would not keep the budget, a later point is taken). Prints accuracy (of free text, the share of full
depth's quality that is kept) and depth with exits at any layer and at the points."""

MAX_ROWS = 2000
"""Rows of a task that are asked, spread over all of them; time grows with their square."""


@dataclass(frozen=True, slots=True)
class TaskExits:
    """One task's rows, to be asked under its own choice."""

    name: str
    rows: Replay
    choice: Choice

    def layers(self) -> list[int]:
        """The exit layer of each row."""
        [layers], _ = self.rows.exits([self.choice])
        return layers.tolist()


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
        told = [
            f"{outcome.accuracy:7.3f} {outcome.depth:7.2f}"
            for limits in ((), points)
            for outcome in task.rows.outcomes([task.choice], limits)
        ]
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
    return Counter(layer for task in tasks for layer in task.layers())


def _tasks(uri: str) -> tuple[list[TaskExits], int]:
    """Those of two rows or more, and the backbone's number of layers."""
    table = ExitTable.open(uri)
    tasks = [t for name in table.metadata.tasks if (t := task_exits(table, name)) is not None]
    if not tasks:
        raise TableError(f"exit table {uri} holds no task of two rows or more; build it first")
    return tasks, table.metadata.backbone.num_layers


def task_exits(table: ExitTable, name: str) -> TaskExits | None:
    """None for a task of which the table has not two rows with exit information."""
    if name not in table.metadata.built:
        return None
    try:
        rows = replay_of(table, name, MAX_ROWS)
    except TaskError:
        return None
    return TaskExits(name, rows, choice_of(table.metadata, table.metadata.tasks[name]))
