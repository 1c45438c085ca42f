"""Summaries asked for in turns, and kept: what was answered once is not asked again.

All rows of the result (full depth, exits, budgets) are asked about the same documents
before the next documents have their turn: whatever slows the machine for longer than a turn slows
all rows alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from openai import BadRequestError

from raee_serve.errors import RaeeError
from raee_serve.evaluation.asking import Answer, Asker
from raee_serve.exits.choice import Choice
from raee_serve.tasks.datasets import Example
from raee_serve.tasks.task import Task

Kind = Literal["full depth", "plain exit", "shortcut exit", "retrieved"]

TURN = 32
"""Documents of a turn."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result. raee: what its requests ask of the server."""

    name: str
    kind: Kind
    raee: Mapping[str, Any] = field(hash=False)


FULL_DEPTH = Row("full depth", "full depth", {"task": None, "exit_layer": "full"})


def rows_of(exits: Sequence[int], budgets: Mapping[float, Choice | None]) -> list[Row]:
    """Full depth, each exit plain and by its shortcut, then the budgets.

    budgets: by the share of full depth's quality that retrieved exits are to keep, how they are
    chosen; None where only full depth keeps it. Only for these requests name their task, for the
    others nothing is looked up.
    """
    fixed = [(d, {"task": None, "exit_layer": d}) for d in exits]
    plain = [Row(f"layer {d}", "plain exit", raee) for d, raee in fixed]
    shortcuts = [
        Row(f"layer {d}, shortcut", "shortcut exit", {**raee, "head": "shortcut"})
        for d, raee in fixed
    ]
    retrieved = [
        Row(f"budget {kept:g}", "retrieved", _asked(choice)) for kept, choice in budgets.items()
    ]
    return [FULL_DEPTH, *plain, *shortcuts, *retrieved]


def _asked(choice: Choice | None) -> Mapping[str, Any]:
    """All of the choice, whatever the table has stored for the task, and to hear of restarts."""
    if choice is None:
        return FULL_DEPTH.raee
    return {"k": choice.k, "budget": choice.budget, "explain": True}


@dataclass(frozen=True, slots=True)
class Turn:
    """The answers of one row to documents first, first + 1, ... of a task, and what they took."""

    task: str
    row: str
    first: int
    seconds: float
    answers: tuple[Answer, ...]


class Kept:
    """Turns in a JSONL file, whose first line says under what settings they were made."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises RaeeError if the file's turns were made under other settings."""
        self.path = path
        self.turns: list[Turn] = []
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return
        # A run that was killed may have left half a line.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        if not lines or json.loads(lines[0]) != json.loads(json.dumps(settings)):
            raise RaeeError(
                f"{path} holds answers made under {lines[0] if lines else 'unknown settings'}, not "
                f"{json.dumps(settings)}; use the same, or another --out"
            )
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.turns = [_turn(json.loads(line)) for line in lines[1:]]

    def has(self, task: str, row: str, first: int) -> bool:
        return any((turn.task, turn.row, turn.first) == (task, row, first) for turn in self.turns)

    def add(self, turn: Turn) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(turn)) + "\n")
        self.turns.append(turn)


async def accepted(server: Asker, task: Task, text: str, rows: Sequence[Row]) -> list[Row]:
    """The rows that the server can serve, each asked once, which also warms it up.

    What it refuses is said: a layer without a shortcut, or a version that knows no budgets.
    """
    found = []
    for row in rows:
        try:
            await server.ask(task, text, row.raee)
            found.append(row)
        except BadRequestError as error:
            print(f"raee-serve: {task.name}: no row {row.name!r}: {error.message}", flush=True)
    return found


async def ask_all(
    server: Asker, task: Task, examples: Sequence[Example], rows: Sequence[Row], kept: Kept, at: int
) -> None:
    """Ask what is not kept yet, with `at` requests at once.

    Each row has a prefix cache of its own: examples that all prompts begin with are computed once
    a row, and no row gains from what another, or the same for other turns, computed of a document.
    """
    for first in range(0, len(examples), TURN):
        texts = [example.text for example in examples[first : first + TURN]]
        for row in rows:
            if kept.has(task.name, row.name, first):
                continue
            extra = {**server.extra, "cache_salt": f"{kept.path.name}: {row.name}"}
            salted = replace(server, extra=extra)
            answers, rps = await salted.ask_all(task, texts, row.raee, at)
            turn = Turn(task.name, row.name, first, len(texts) / rps, tuple(answers))
            kept.add(turn)
            print(
                f"raee-serve: {task.name}, {row.name}: {first + len(texts)} of {len(examples)}, "
                f"{turn.seconds:.1f} s",
                flush=True,
            )


def _turn(fields: dict[str, Any]) -> Turn:
    answers = tuple(Answer(**answer) for answer in fields.pop("answers"))
    return Turn(**fields, answers=answers)
