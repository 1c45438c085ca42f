"""Ask a running server about a task's texts, as a user of the openai SDK would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from openai import AsyncOpenAI

from raee_serve.tasks.task import Task

SUMMARY_TOKENS = 64
"""Output length for free text; a label is one answer of the server, or one token of its LM head."""


UNDECIDED = {
    "x-raee-exit-layer": "0",
    "x-raee-num-layers": "0",
    "x-raee-reason": "",
    "x-raee-distance": "",
}
"""What stands for the headers of a server that decides nothing."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer to one prompt and what its headers say about the decision.

    restarted: whether it looped and was begun again at full depth; known of requests that ask to
    `explain`.
    """

    text: str
    prompt_tokens: int
    output_tokens: int
    exit_layer: int
    num_layers: int
    reason: str
    distance: str
    latency_s: float
    restarted: bool = False

    @property
    def depth(self) -> float:
        """Layers run, as a share of all; of a restarted answer those of both runs, as if the first
        had gone to its end."""
        return self.exit_layer / self.num_layers + self.restarted


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks `model` at `client`.

    settings: of every request, beside or in place of those that `ask` makes.
    extra: of every request too, what the SDK does not know.
    decides: False for vanilla vLLM, whose requests carry no `raee` and whose answers no headers.
    """

    client: AsyncOpenAI
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    decides: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    async def ask(self, task: Task, text: str, raee: Mapping[str, Any]) -> Answer:
        """The answer to one text, greedily sampled; `raee` goes along beside the task's name."""
        start = time.perf_counter()
        prompt = task.render(text)
        ours = {"raee": {"task": task.name, **raee}} if self.decides else {}
        common: dict[str, Any] = {
            "model": self.model,
            "temperature": 0.0,
            "max_tokens": 1 if task.kind == "labels" else SUMMARY_TOKENS,
            "extra_body": {**self.extra, **ours},
            **self.settings,
        }
        if isinstance(prompt, str):
            raw = await self.client.completions.with_raw_response.create(prompt=prompt, **common)
            parsed = raw.parse()
            said = parsed.choices[0].text
        else:
            chat = self.client.chat.completions.with_raw_response
            raw = await chat.create(messages=cast(Any, prompt), **common)
            parsed = raw.parse()
            said = parsed.choices[0].message.content
        headers = raw.headers if self.decides else UNDECIDED
        return Answer(
            text=said or "",
            prompt_tokens=parsed.usage.prompt_tokens,
            output_tokens=parsed.usage.completion_tokens,
            exit_layer=int(headers["x-raee-exit-layer"]),
            num_layers=int(headers["x-raee-num-layers"]),
            reason=headers["x-raee-reason"],
            distance=headers["x-raee-distance"],
            latency_s=time.perf_counter() - start,
            restarted=was_restarted(getattr(parsed, "raee", None)),
        )

    async def ask_all(
        self, task: Task, texts: Sequence[str], raee: Mapping[str, Any], concurrency: int
    ) -> tuple[list[Answer], float]:
        """Answers in the order of `texts`, and requests per second with `concurrency` at once."""
        free = asyncio.Semaphore(concurrency)

        async def one(text: str) -> Answer:
            async with free:
                return await self.ask(task, text, raee)

        start = time.perf_counter()
        answers = await asyncio.gather(*(one(text) for text in texts))
        return answers, len(texts) / (time.perf_counter() - start)


def was_restarted(raee: Mapping[str, Any] | None) -> bool:
    """raee: an answer's object of that name, if there is one."""
    return raee is not None and any(prompt.get("restarted") for prompt in raee["prompts"])


def asker(
    base_url: str, model: str, settings: Mapping[str, Any] | None = None, *, decides: bool = True
) -> Asker:
    """An asker for the server at `base_url`, with or without /v1. The key is OPENAI_API_KEY's."""
    import os

    url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return Asker(AsyncOpenAI(base_url=url, api_key=key), model, settings or {}, decides)
