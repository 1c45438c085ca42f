"""Hundreds of connections to one server, many of which leave early: nothing lost, crossed or kept.

Every prompt is asked once beforehand, alone; from then on each answer has to be the same tokens to
the same prompt, whatever else is in the batch. Prompts run at random depths, some by a look-up.

- answered, aborted: requests. lost: neither aborted nor answered within ANSWER_TIMEOUT_S, or with
  an error. crossed: answered with other tokens, or to another prompt.
- left: what the engine says it still holds when all is over: requests, and the share of KV blocks.
- memory: of each process, from the end of the warm-up (a quarter of the time) on: some samples,
  and the slope of a line through all of them.

With --vanilla all of it is asked of vLLM's own server, where every prompt runs at full depth: what
its memory does too is not ours to mend.
"""

import argparse
import asyncio
import json
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.machine import machine
from benchmarks.metrics_page import total
from benchmarks.tables import build_table
from raee_serve.checkpoints import local_checkpoint
from raee_serve.evaluation.run import PATIENT_TIMEOUT_MS
from raee_serve.evaluation.server_process import (
    VANILLA_ENVIRONMENT,
    raee_command,
    running_process,
    vanilla_command,
)
from raee_serve.tasks.datasets import load_examples
from raee_serve.tasks.registry import get_task

TASK, ROWS = "demo_sentiment", 60
FLAGS = ("--max-model-len", "1024", "--dtype", "float32")
ANSWER_TIMEOUT_S = 300.0
LONGEST_STAY_S = 5.0
"""After which a client that leaves early has left."""
MOST_TOKENS, LEAST_TOKENS = 24, 2
MIN_MARGIN = 0.2
"""Between the two best tokens' log-probabilities: what is nearer may change with the batch."""
SAMPLE_S = 2.0
SHOWN = 8
"""Samples of each process that are reported."""
MAX_GROWTH = 0.05
"""Of a process's memory, over the time after the warm-up, within which it counts as flat."""
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@dataclass(frozen=True)
class Case:
    """body: of the request. prompt, tokens: token ids of the prompt, and of the answer to it."""

    body: dict[str, Any]
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def request_body(model: str, prompt: str, **raee: Any) -> dict[str, Any]:
    body = {
        "model": model,
        "prompt": prompt,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return body | ({"raee": raee} if raee else {})


async def find_cases(
    client: httpx.AsyncClient, model: str, num_layers: int | None, count: int, rng: random.Random
) -> list[Case]:
    """Prompts with answers that are clear, and different from each other's; one in four by look-up.

    num_layers: None for vanilla vLLM, where there are no look-ups and no depths.
    An answer ends before its first token that is no clear choice.
    """
    texts = [example.text for example in load_examples(get_task(TASK), "train")]
    cases: dict[tuple[int, ...], Case] = {}
    for number, text in enumerate(rng.sample(texts, len(texts))):
        by_lookup = num_layers is not None and number % 4 == 0
        if by_lookup:
            case = await _alone(client, request_body(model, f"{text} It was", task=TASK), 1)
        else:
            body = request_body(model, text, **_random_depth(num_layers, rng))
            case = await _alone(client, body | {"max_tokens": MOST_TOKENS}, LEAST_TOKENS)
        if case is not None:
            cases.setdefault(case.prompt if by_lookup else case.tokens, case)
        if len(cases) == count:
            return list(cases.values())
    raise SystemExit(f"only {len(cases)} of {len(texts)} prompts have a clear answer")


def _random_depth(num_layers: int | None, rng: random.Random) -> dict[str, int]:
    if num_layers is None:
        return {}
    return {"exit_layer": rng.choice([num_layers, rng.randint(1, num_layers)])}


async def _alone(client: httpx.AsyncClient, body: dict[str, Any], least: int) -> Case | None:
    """The answer up to where it is not clear; None if that is less than so many tokens.

    Without `max_tokens` it is a label, and all of it.
    """
    reply = await client.post("/v1/completions", json=body | {"logprobs": 2})
    reply.raise_for_status()
    choice = reply.json()["choices"][0]
    prompt, tokens = tuple(choice["prompt_token_ids"]), tuple(choice["token_ids"])
    if "max_tokens" not in body:
        return Case(body, prompt, tokens)
    best = [sorted(top.values()) for top in choice["logprobs"]["top_logprobs"]]
    length = [*(top[-1] - top[-2] > MIN_MARGIN for top in best), False].index(False)
    limited = body | {"max_tokens": length}
    return Case(limited, prompt, tokens[:length]) if length >= least else None


async def soak(
    client: httpx.AsyncClient,
    cases: Sequence[Case],
    *,
    connections: int,
    seconds: float,
    abort_share: float,
    seed: int = 0,
) -> Counter[str]:
    """Outcomes of the requests of `connections` clients that ask one after the other."""
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def ask_on(rng: random.Random) -> None:
        while time.monotonic() < end:
            stay = rng.uniform(0, LONGEST_STAY_S) if rng.random() < abort_share else None
            outcome = await _outcome(client, rng.choice(cases), rng.random() < 0.5, stay)
            outcomes[outcome] += 1

    await asyncio.gather(*(ask_on(random.Random(f"{seed} {n}")) for n in range(connections)))
    return outcomes


async def _outcome(client: httpx.AsyncClient, case: Case, stream: bool, stay: float | None) -> str:
    """answered, aborted, lost or crossed. stay: seconds until the client leaves; None: it waits."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S if stay is None else stay):
            ask = _streamed if stream else _whole
            prompt, tokens = await ask(client, case.body)
    except TimeoutError:
        return "lost" if stay is None else "aborted"
    except (httpx.HTTPError, KeyError, ValueError) as error:
        print(f"lost: {error!r}", flush=True)
        return "lost"
    if (prompt, tokens) == (case.prompt, case.tokens):
        return "answered"
    print(f"crossed: {case} was answered {tokens}, to {prompt}", flush=True)
    return "crossed"


Answer = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of the prompt and of the answer, as the server states both."""


async def _whole(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    reply = await client.post("/v1/completions", json=body)
    reply.raise_for_status()
    choice = reply.json()["choices"][0]
    return tuple(choice["prompt_token_ids"]), tuple(choice["token_ids"])


async def _streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    prompt: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                return prompt, tokens
            if line.startswith("data: "):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                prompt = prompt or tuple(choice["prompt_token_ids"] or ())
                tokens += tuple(choice["token_ids"] or ())
    raise ValueError("the stream ended before it was done")


def still_held(url: str, ask_once: Any, timeout_s: float = 60.0) -> dict[str, float]:
    """What vLLM's gauges say once nobody asks any more; all 0 as soon as they are.

    ask_once: makes one request, for the gauges are of the engine's last step.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        ask_once()
        time.sleep(0.5)
        held = {name: total(url, name) for name in GAUGES}
        if not any(held.values()) or time.monotonic() > deadline:
            return held


class MemoryWatch:
    """Samples the resident memory of a process and all its children until it is told to stop."""

    def __init__(self, pid: int) -> None:
        root = psutil.Process(pid)
        self._processes = [root, *root.children(recursive=True)]
        self._samples: list[tuple[float, list[float]]] = []
        self._ended = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            used = [process.memory_info().rss / 2**20 for process in self._processes]
            self._samples.append((time.monotonic() / 60, used))

    def stop(self) -> list[dict[str, Any]]:
        """By process, over what came after a quarter of the time; MB and minutes."""
        self._ended.set()
        self._thread.join()
        late = self._samples[len(self._samples) // 4 :]
        minutes = np.array([when for when, _ in late])
        return [
            self._line(process.name(), minutes, np.array([used[i] for _, used in late]))
            for i, process in enumerate(self._processes)
        ]

    @staticmethod
    def _line(name: str, minutes: np.ndarray, used: np.ndarray) -> dict[str, Any]:
        slope = float(np.polyfit(minutes - minutes[0], used, 1)[0])
        growth = slope * float(minutes[-1] - minutes[0])
        shown = used[np.linspace(0, len(used) - 1, SHOWN).astype(int)]
        return {
            "process": name,
            "mb": [round(float(mb)) for mb in shown],
            "mb_per_minute": round(slope, 3),
            "is_flat": bool(growth <= MAX_GROWTH * used[0]),
        }


async def run(
    url: str, pid: int, args: argparse.Namespace, num_layers: int | None
) -> dict[str, Any]:
    rng = random.Random(args.seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:
        cases = await find_cases(client, args.model, num_layers, args.prompts, rng)
        lengths = [len(case.tokens) for case in cases]
        print(f"{len(cases)} prompts, answers of {min(lengths)} to {max(lengths)} tokens")
        watch = MemoryWatch(pid)
        start = time.monotonic()
        outcomes = await soak(
            client,
            cases,
            connections=args.connections,
            seconds=args.minutes * 60,
            abort_share=args.abort_share,
            seed=args.seed,
        )
        seconds = time.monotonic() - start
        memory = watch.stop()
    body = cases[0].body
    left = await asyncio.to_thread(
        still_held, url, lambda: httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    )
    names = ("answered", "aborted", "lost", "crossed")
    return {
        **{name: outcomes[name] for name in names},
        "answers_per_s": round(outcomes["answered"] / seconds, 1),
        "seconds": round(seconds, 1),
        "left": left,
        "memory": memory,
    }


def is_sound(result: dict[str, Any]) -> bool:
    wrong = result["lost"] or result["crossed"] or any(result["left"].values())
    return not wrong and all(line["is_flat"] for line in result["memory"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--abort-share", type=float, default=0.3, metavar="P")
    parser.add_argument("--prompts", type=int, default=48, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vanilla", action="store_true", help="vLLM's own server instead")
    parser.add_argument("--log", type=Path, help="keep the server's log here")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch, server(args, f"{scratch}/table") as started:
        url, process = started
        num_layers = None if args.vanilla else int(total(url, "raee_num_layers"))
        result = asyncio.run(run(url, process.pid, args, num_layers))
    system = "vanilla vLLM" if args.vanilla else "raee-serve"
    result = {
        "system": system,
        "connections": args.connections,
        "model": args.model,
        **result,
    }
    print("\n".join(f"{name}: {value}" for name, value in result.items()))
    if args.json:
        print(json.dumps({**result, "machine": machine(), "is_sound": is_sound(result)}))
    raise SystemExit(0 if is_sound(result) else 1)


def server(
    args: argparse.Namespace, table: str
) -> AbstractContextManager[tuple[str, subprocess.Popen[bytes]]]:
    """URL and process of a server of `args.model`; its exit table is made first."""
    if args.vanilla:
        checkpoint = local_checkpoint(args.model)
        command = vanilla_command(checkpoint, args.model, ["--enforce-eager", *FLAGS])
        return running_process(command, VANILLA_ENVIRONMENT, log=args.log)
    build_table(args.model, [TASK], table, limit=ROWS)
    flags = ["--table", table, *FLAGS, "--lookup-timeout-ms", str(PATIENT_TIMEOUT_MS)]
    return running_process(raee_command(args.model, flags), log=args.log)


if __name__ == "__main__":
    main()
