"""Ways to have prompts answered by running servers, asked in turns."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raee_serve.errors import RaeeError
from raee_serve.evaluation.asking import Answer, asker
from raee_serve.evaluation.metrics import predicted_label
from raee_serve.evaluation.run import LENGTH_FLAGS, OWN_SERVER_FLAGS, WARM_UP
from raee_serve.evaluation.server_process import (
    VANILLA_ENVIRONMENT,
    awake,
    raee_command,
    running_process,
    standing_still,
    vanilla_command,
)
from raee_serve.evaluation.suite.findings import Row
from raee_serve.table.probe import default_dtype
from raee_serve.table.task import Kind, Task

CONCURRENCY = 32
"""Requests under way at once, where requests/s are measured."""
TURN: dict[Kind, int] = {"labels": 64, "free-text": 16}
"""Prompts that a way is asked about, more or less, before another one has its turn."""
ALONE_SHARE = 8
"""One in so many prompts of a task is asked alone, for its latency."""
VANILLA_FLAGS = ("--enforce-eager", "--no-enable-prefix-caching", *LENGTH_FLAGS)
"""As raee-serve's own: compiling gains nothing on CPU, and no way profits from another's turn."""


@dataclass(frozen=True, slots=True)
class System:
    """A running server. model: the name by which requests ask for it.

    decides: False for vanilla vLLM. process: if it stands still except while it is asked.
    """

    url: str
    model: str
    decides: bool = True
    process: subprocess.Popen[bytes] | None = None


@contextmanager
def raee_system(model: str, table: str) -> Iterator[System]:
    """raee-serve, standing still. Raises ServerStartError."""
    flags = ["--table", table, *_dtype_flags(), *OWN_SERVER_FLAGS, *LENGTH_FLAGS]
    with running_process(raee_command(model, flags)) as (url, process), standing_still(process):
        yield System(url, model, process=process)


@contextmanager
def vanilla_system(checkpoint: Path, model: str, flags: Sequence[str] = ()) -> Iterator[System]:
    """Vanilla vLLM, standing still. Raises ServerStartError."""
    command = vanilla_command(checkpoint, model, [*_dtype_flags(), *VANILLA_FLAGS, *flags])
    server = running_process(command, VANILLA_ENVIRONMENT)
    with server as (url, process), standing_still(process):
        yield System(url, model, decides=False, process=process)


def _dtype_flags() -> list[str]:
    """That of the weights when tables are probed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ["--dtype", str(default_dtype(device)).removeprefix("torch.")]


@dataclass(frozen=True, slots=True)
class Way:
    """How a server is asked. raee: for raee-serve, beside a request's task; settings: a task's
    own, of every request."""

    system: System
    raee: Mapping[str, Any]
    settings: Callable[[Task], Mapping[str, Any]] = lambda task: {}

    async def ask(
        self, task: Task, texts: Sequence[str], concurrency: int
    ) -> tuple[list[Answer], float]:
        """Answers in the order of the texts, and the seconds they took."""
        system = self.system
        server = asker(system.url, system.model, self.settings(task), decides=system.decides)
        running: AbstractContextManager[None] = nullcontext()
        if system.process is not None:
            running = awake(system.process)
        with running:
            try:
                answers, rps = await server.ask_all(task, texts, self.raee, concurrency)
            finally:
                await server.client.close()  # idle connections would be closed by the server
        return answers, len(texts) / rps


@dataclass(slots=True)
class Timed:
    """A way's answers to the prompts of one task, in their order.

    alone_s: seconds of each of the first ones, asked one at a time; seconds: of all the others,
    CONCURRENCY at a time.
    """

    answers: list[Answer]
    alone_s: list[float]
    seconds: float = 0.0

    @property
    def loaded(self) -> int:
        """Answers that `seconds` are of."""
        return len(self.answers) - len(self.alone_s)

    @property
    def depth(self) -> float:
        """Mean over the answers."""
        return float(np.mean([answer.depth for answer in self.answers]))


def in_turns(ways: Sequence[Way], prompts: Mapping[Task, Sequence[str]]) -> list[dict[str, Timed]]:
    """Of each way, by task; all ways are asked the same prompts.

    All are asked about some prompts before the next prompts have their turn, so that whatever slows
    the machine for longer than that slows all of them alike. Raises RaeeError for fewer than 2
    prompts of a task.
    """
    for task, texts in prompts.items():
        if len(texts) < 2:
            raise RaeeError(
                f"{len(texts)} prompts of task {task.name} to measure speed on; allowed: 2 or more"
            )
    return asyncio.run(_in_turns(ways, prompts))


async def _in_turns(
    ways: Sequence[Way], prompts: Mapping[Task, Sequence[str]]
) -> list[dict[str, Timed]]:
    timed: list[dict[str, Timed]] = [{} for _ in ways]
    for task, texts in prompts.items():
        alone = -(-len(texts) // ALONE_SHARE)
        for way, own in zip(ways, timed, strict=True):
            # Not of the prompts: raee-serve remembers the vectors of texts.
            await way.ask(task, [f"warm-up {i}" for i in range(WARM_UP)], WARM_UP)
            answers, _ = await way.ask(task, texts[:alone], 1)
            own[task.name] = Timed(answers, [answer.latency_s for answer in answers])
        turns = max(1, round((len(texts) - alone) / TURN[task.kind]))
        for turn, part in enumerate(np.array_split(texts[alone:], turns)):
            pairs = list(zip(ways, timed, strict=True))
            for way, own in pairs[:: -1 if turn % 2 else 1]:
                answers, seconds = await way.ask(task, part.tolist(), CONCURRENCY)
                own[task.name].answers += answers
                own[task.name].seconds += seconds
    return timed


def speed(own: Mapping[str, Timed], other: Mapping[str, Timed]) -> Row:
    """requests/s, over all tasks; speed: the same over that of another way, on the same prompts;
    latency ms: median of the prompts asked alone."""
    seconds = sum(timed.seconds for timed in own.values())
    alone = [s for timed in own.values() for s in timed.alone_s]
    return {
        "requests/s": round(sum(timed.loaded for timed in own.values()) / seconds, 2),
        "speed": round(sum(timed.seconds for timed in other.values()) / seconds, 3),
        "latency ms": round(1000 * float(np.median(alone)), 1),
    }


def predicted(task: Task, answers: Sequence[Answer]) -> NDArray[np.int64]:
    """[n] label indices, -1 for an answer that is no label word."""
    labels = [predicted_label(task, answer.text) for answer in answers]
    return np.array([-1 if label is None else label for label in labels])
