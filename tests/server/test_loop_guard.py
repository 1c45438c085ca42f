"""At its first layer SmolLM2 repeats itself at once; under the guard the answer is full depth's."""

import urllib.request

import pytest

from raee_serve.server.loops import LoopDetector
from tests.server.conftest import MODEL

pytestmark = pytest.mark.server

PROMPT, LENGTH = "The capital of France is", 48


def ask(served, *, stream, n, **raee):
    """(token ids by completion, whether it is said to be restarted, usage) of the answer."""
    answer = served.client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=LENGTH,
        temperature=0.05,
        seed=7,
        n=n,
        stream=stream,
        stream_options={"include_usage": True} if stream else None,
        extra_body={
            "raee": {**raee, "explain": True},
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    chunks = list(answer) if stream else [answer]
    tokens = [[] for _ in range(n)]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        tokens[choice.index] += choice.token_ids
    restarted = chunks[0].model_extra["raee"]["prompts"][0].get("restarted", False)
    return tokens, restarted, chunks[-1].usage


def restarts(served):
    page = urllib.request.urlopen(f"{served.url}/metrics", timeout=30).read().decode()
    lines = [line for line in page.splitlines() if line.startswith("raee_guard_restarts_total{")]
    return sum(float(line.split()[-1]) for line in lines)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_an_early_answer_that_loops_is_full_depths(served, stream, n):
    before, kind = restarts(served), {"stream": stream, "n": n}
    looping, is_restarted, _ = ask(served, **kind, exit_layer=1)
    assert all(LoopDetector().add_all(tokens) for tokens in looping) and not is_restarted
    full, _, usage = ask(served, **kind, exit_layer="full")
    guarded = ask(served, **kind, exit_layer=1, loop_guard=True)
    assert guarded == (full, True, usage)
    assert full != looping and usage.completion_tokens == LENGTH * n
    assert restarts(served) == before + 1
