"""Requests of a shape, sent by the load generator of `vllm bench serve`.

It is called as a function (`vllm.benchmarks.serve.benchmark`), which its command line wraps: so the
requests of one run can belong to several tasks, and a run does not begin with the seconds that
importing vLLM takes.
"""

import asyncio
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.serve import TaskType, benchmark

from benchmarks.serving_shapes import Asked, Shape
from raee_serve.tasks.task import prompt_token_ids


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive. rate: a second, as a Poisson process; infinite: all at once.

    concurrency: requests under way at most. seed: of the arrivals, the same for every system.
    list_of: prompts of a request, all of one task.
    """

    rate: float
    concurrency: int | None
    seed: int
    list_of: int = 1


class Generator:
    """Sends requests to servers of one model. log: takes what vLLM prints about each run."""

    def __init__(self, model: str, tokenizer: Any, log: TextIO) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._log = log

    def run(
        self, url: str, shape: Shape, asked: Sequence[Asked], load: Load, names_tasks: bool
    ) -> dict[str, Any]:
        """vLLM's result, as `vllm bench serve --save-detailed` writes it.

        names_tasks: whether requests say to which task they belong; vanilla vLLM's do not.
        Raises `RuntimeError` if any request failed.
        """
        requests = [self._request(shape, own, names_tasks) for own in lists_of(asked, load.list_of)]
        endpoint = "/v1/chat/completions" if shape.is_chat else "/v1/completions"
        np.random.seed(load.seed)  # from which vLLM draws the arrivals
        with redirect_stdout(self._log):
            result = asyncio.run(
                benchmark(
                    task_type=TaskType.GENERATION,
                    endpoint_type="openai-chat" if shape.is_chat else "openai",
                    api_url=url + endpoint,
                    base_url=url,
                    model_id=self._model,
                    model_name=self._model,
                    tokenizer=self._tokenizer,
                    input_requests=requests,
                    logprobs=None,
                    request_rate=load.rate,
                    burstiness=1.0,
                    disable_tqdm=True,
                    num_warmups=0,
                    profile=False,
                    selected_percentile_metrics=["ttft", "tpot", "e2el"],
                    selected_percentiles=[50, 99],
                    ignore_eos=True,
                    goodput_config_dict={},
                    max_concurrency=load.concurrency,
                    lora_modules=None,
                    extra_headers=None,
                    extra_body={"temperature": 0.0},
                    ready_check_timeout_sec=0,
                )
            )
        if result["failed"]:
            error = next(error for error in result["errors"] if error)
            raise RuntimeError(f"{result['failed']} of {len(requests)} requests failed: {error}")
        return result

    def _request(self, shape: Shape, asked: Sequence[Asked], names_task: bool) -> SampleRequest:
        """Of one prompt, or of a list of prompts of one task."""
        task = asked[0].task
        prompt = task.render(asked[0].text)
        extra: dict[str, Any] = {}
        if names_task:
            extra["raee"] = {"task": task.name}
        elif task.kind == "labels":
            extra["allowed_token_ids"] = list(task.plain_token_ids(self._tokenizer))
        if len(asked) > 1:  # in place of the one prompt, which vLLM's type wants
            extra["prompt"] = [task.render(one.text) for one in asked]
        return SampleRequest(
            prompt=prompt if isinstance(prompt, str) else "",
            prompt_len=len(prompt_token_ids(self._tokenizer, prompt)),
            expected_output_len=shape.output_len,
            chat_messages=None if isinstance(prompt, str) else prompt,
            request_overrides=extra,
        )


def lists_of(asked: Sequence[Asked], count: int) -> list[list[Asked]]:
    """Groups of so many, each of one task, in the order of their first ones; what is left of a
    task is a smaller group."""
    if count == 1:
        return [[one] for one in asked]
    groups: list[list[Asked]] = []
    open_ones: dict[str, list[Asked]] = {}
    for one in asked:
        group = open_ones.get(one.task.name)
        if group is None or len(group) == count:
            group = open_ones[one.task.name] = []
            groups.append(group)
        group.append(one)
    return groups
