"""At its first layer SmolLM2 repeats itself at once; under the guard the answer is full depth's."""

import asyncio

import pytest

from benchmarks.metrics_page import total
from raee_serve.evaluation.asking import asker
from raee_serve.server.loops import LoopDetector
from raee_serve.tasks.registry import get_task
from tests.server.conftest import MODEL, NUM_LAYERS

pytestmark = pytest.mark.server

PROMPT, LENGTH = "The capital of France is", 48


def ask(served, *, stream, **raee):
    """(token ids, whether the `raee` object says that it was restarted, usage) of the answer."""
    answer = served.client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=LENGTH,
        temperature=0,
        stream=stream,
        stream_options={"include_usage": True} if stream else None,
        extra_body={
            "raee": {**raee, "explain": True},
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    chunks = list(answer) if stream else [answer]
    tokens = [t for chunk in chunks for choice in chunk.choices for t in choice.token_ids]
    restarted = chunks[0].model_extra["raee"]["prompts"][0].get("restarted", False)
    return tokens, restarted, chunks[-1].usage


def restarts(served):
    return total(served.url, "raee_guard_restarts_total")


@pytest.mark.parametrize("stream", [False, True])
def test_an_early_answer_that_loops_is_full_depths(served, stream):
    before = restarts(served)
    looping, is_restarted, _ = ask(served, stream=stream, exit_layer=1)
    assert LoopDetector().add_all(looping) and not is_restarted
    full, _, usage = ask(served, stream=stream, exit_layer="full")
    guarded = ask(served, stream=stream, exit_layer=1, loop_guard=True)
    assert guarded == (full, True, usage)
    assert full != looping and usage.completion_tokens == LENGTH
    assert restarts(served) == before + 1


def test_an_evaluation_hears_of_it(served):
    server = asker(served.url, MODEL, {"max_tokens": LENGTH})
    raee = {"task": None, "exit_layer": 1, "loop_guard": True, "explain": True}
    answer = asyncio.run(server.ask(get_task("demo_summary"), "It rained all day.", raee))
    assert answer.restarted and answer.depth == 1 + 1 / NUM_LAYERS
