"""The task registry: every module in this package holds one `TASK`."""

from __future__ import annotations

import importlib
import pkgutil

from raee_serve.errors import TaskError
from raee_serve.table.task import Task


def _collect() -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        task = importlib.import_module(f"{__name__}.{module.name}").TASK
        assert task.name == module.name, f"{module.name}.py defines task {task.name}"
        tasks[task.name] = task
    return tasks


TASKS: dict[str, Task] = _collect()


def get_task(name: str) -> Task:
    """The task of that name; TaskError lists the names there are."""
    try:
        return TASKS[name]
    except KeyError:
        raise TaskError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}") from None
