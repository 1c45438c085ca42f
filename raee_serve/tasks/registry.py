"""The shipped tasks, and where `--task` finds those that are named and those in files."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path

from raee_serve.errors import TaskError
from raee_serve.tasks.data_files import expanded
from raee_serve.tasks.task import Task
from raee_serve.tasks.task_file import read_task_file

ENDING = ".toml"
SHIPPED = Path(__file__).parent / "shipped"
DEMO_DATA = Path(__file__).parents[1] / "demo_data"
"""Task files beside their data, like a user's own; the data of the others are not shipped."""


def _shipped() -> dict[str, Task]:
    files = [*SHIPPED.glob(f"*{ENDING}"), *DEMO_DATA.glob(f"*{ENDING}")]
    return {
        file.stem: read_task_file(file, is_shipped=file.parent != DEMO_DATA)
        for file in sorted(files, key=lambda file: file.stem)
    }


TASKS: dict[str, Task] = _shipped()


def add_task_argument(parser: ArgumentParser, note: str = "", *, required: bool = True) -> None:
    """--task, as `get_tasks` takes it. note: put before the help's own words."""
    parser.add_argument(
        "--task",
        action="append",
        required=required,
        metavar="NAME|FILE",
        help=f"{note}repeatable; a task file ({ENDING}), or one of {', '.join(TASKS)}",
    )


def is_file(name: str) -> bool:
    """Whether --task means a task file by this."""
    return name.endswith(ENDING) or os.sep in name


def get_task(name: str) -> Task:
    """The shipped task of that name, or the one in a task file. Raises TaskError."""
    if is_file(name):
        return read_task_file(expanded(name))
    if name not in TASKS:
        raise TaskError(
            f"unknown task {name!r}; allowed: a task file ({ENDING}), or one of {', '.join(TASKS)}"
        )
    return TASKS[name]


def by_name(given: Iterable[str]) -> dict[str, str]:
    """What was given of each task: a file, or a name, which only the table need know."""
    return {get_task(one).name if is_file(one) else one: one for one in given}


def get_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks in their order, each once. Raises TaskError for two of one name."""
    tasks: dict[str, Task] = {}
    for given in dict.fromkeys(names):
        task = get_task(given)
        if tasks.setdefault(task.name, task) is not task:
            raise TaskError(f"task {task.name} is given twice, the second time as {given}")
    return list(tasks.values())
