"""The same requests with depths looked up, and with these depths given, in turns."""

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.statistics import paired_ratio
from benchmarks.tables import build_table
from raee_serve.evaluation.asking import Asker, asker
from raee_serve.evaluation.server_process import running_server
from raee_serve.tasks.datasets import shuffled_examples
from raee_serve.tasks.registry import get_task
from raee_serve.tasks.task import Task

CONCURRENCY = 32
TURN = 128
"""Requests of one turn."""
FLAGS = ("--no-enable-prefix-caching", "--max-model-len", "1024", "--lookup-timeout-ms", "10000")


def throughput_ratio(args: argparse.Namespace) -> dict[str, object]:
    """Median over rounds; each takes other prompts, first looked up, then at the depths found."""
    task = get_task(args.task)
    table = args.table or _built(args)
    flags = ["--table", table, "--encoder-backend", args.encoder_backend, "--dtype", args.dtype]
    log = Path(args.workdir) / "server.log"
    with running_server(args.model, [*flags, *FLAGS], log=log) as url:
        rates = asyncio.run(_rates(asker(url, args.model), task, _prompts(task, args)))
    placed = [line for line in log.read_text().splitlines() if "raee-serve: look-ups" in line]
    ratio = paired_ratio(rates["retrieved"], rates["forced"])
    print("\n".join(placed))
    print(f"requests/s retrieved / forced: {ratio} ({len(rates['forced'])} rounds of {TURN})")
    return {
        "server_model": args.model,
        "server_dtype": args.dtype,
        "server_task": task.name,
        "server_throughput_ratio": round(ratio.median, 4),
        "server_ratio": ratio.as_dict(),
    }


async def _rates(server: Asker, task: Task, prompts: Sequence[str]) -> dict[str, list[float]]:
    """Requests/s of each turn; the first round warms up and is not counted."""
    rates: dict[str, list[float]] = {"retrieved": [], "forced": []}
    for first in range(0, len(prompts) - TURN + 1, TURN):
        turn = prompts[first : first + TURN]
        layers, rate = await _ask(server, task, turn, [None] * TURN)
        rates["retrieved"].append(rate)
        _, rate = await _ask(server, task, turn, layers)
        rates["forced"].append(rate)
        print({name: f"{own[-1]:.1f}/s" for name, own in rates.items()}, flush=True)
    return {name: own[1:] for name, own in rates.items()}


async def _ask(
    server: Asker, task: Task, prompts: Sequence[str], layers: Sequence[int | None]
) -> tuple[list[int], float]:
    """Exit layers of the prompts, and requests/s.

    The loop guard, which no given depth has, is left out of depths looked up.
    """
    free = asyncio.Semaphore(CONCURRENCY)

    async def one(prompt: str, layer: int | None) -> int:
        async with free:
            options = {"loop_guard": False} if layer is None else {"exit_layer": layer}
            return (await server.ask(task, prompt, options)).exit_layer

    start = time.perf_counter()
    found = await asyncio.gather(*map(one, prompts, layers))
    return list(found), len(prompts) / (time.perf_counter() - start)


def _prompts(task: Task, args: argparse.Namespace) -> list[str]:
    """Different prompts for all rounds; of a small task each several times, with a number added."""
    found = [e.text for e in shuffled_examples(task, "test", args.data, seed=0)]
    wanted = (args.rounds + 1) * TURN
    return [found[i % len(found)] + f" {i}" * (i >= len(found)) for i in range(wanted)]


def _built(args: argparse.Namespace) -> str:
    """A table of the task for the model, made unless it is in the working directory."""
    table = str(Path(args.workdir) / f"server-{args.model}")
    build_table(args.model, [args.task], table, 2000, args.data)
    return table
