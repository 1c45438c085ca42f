"""`benchmarks.soak` sees what it is there to see."""

import asyncio
import json
import random
from collections import Counter

import httpx
import pytest

from benchmarks.soak import Case, find_cases, is_sound, soak

pytestmark = pytest.mark.unit

CASES = [Case({"prompt": f"p{n}"}, (n,), (n, n + 1)) for n in range(5)]


def outcomes(answer, abort_share=0.0):
    """Of a few clients for a moment. answer: (number of the prompt) -> token ids, or a status."""

    async def handle(request):
        body = json.loads(request.content)
        number = int(body["prompt"][1:])
        await asyncio.sleep(0.001)
        tokens = answer(number)
        if isinstance(tokens, int):
            return httpx.Response(tokens)
        choice = {"prompt_token_ids": [number], "token_ids": tokens}
        if not body.get("stream"):
            return httpx.Response(200, json={"choices": [choice]})
        parts = [choice | {"token_ids": [token]} for token in tokens]
        events = [f"data: {json.dumps({'choices': [part]})}\n\n" for part in parts]
        end = [] if tokens[-1] == CUT_SHORT else ["data: [DONE]\n\n"]
        return httpx.Response(200, text="".join([*events, *end]))

    async def run():
        transport = httpx.MockTransport(handle)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            options = {"connections": 4, "seconds": 0.2, "abort_share": abort_share}
            return await soak(client, CASES, **options)

    return asyncio.run(run())


CUT_SHORT = -1


def test_right_answers_are_answered():
    found = outcomes(lambda n: [n, n + 1])
    assert found["answered"] > 4 and set(found) == {"answered"}


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (lambda n: [n + 1, n + 2], "crossed"),  # another prompt's
        (lambda n: [n], "crossed"),
        (lambda n: 500, "lost"),
    ],
)
def test_others_are_not(answer, outcome):
    assert set(outcomes(answer)) == {outcome}


def test_a_stream_that_is_cut_short_is_lost():
    found = outcomes(lambda n: [n, CUT_SHORT])
    assert found["lost"] > 0 and found["answered"] == 0


SOUND = {
    **Counter(answered=9, aborted=2, lost=0, crossed=0),
    "left": {"running": 0.0},
    "memory": [{"is_flat": True}],
}


@pytest.mark.parametrize(
    "wrong", [{"lost": 1}, {"crossed": 1}, {"left": {"kv": 0.1}}, {"memory": [{"is_flat": False}]}]
)
def test_what_is_not_sound(wrong):
    assert is_sound(SOUND) and not is_sound(SOUND | wrong)


@pytest.mark.parametrize("num_layers", [None, 30])
def test_vanilla_is_asked_for_neither_depth_nor_look_up(num_layers):
    asked = []

    def handle(request):
        body = json.loads(request.content)
        asked.append(body)
        tokens = [len(asked), 1, 2]
        clear = {"top_logprobs": [{"a": -0.1, "b": -4.0}] * len(tokens)}
        choice = {"prompt_token_ids": [7], "token_ids": tokens, "logprobs": clear}
        return httpx.Response(200, json={"choices": [choice]})

    async def run():
        transport = httpx.MockTransport(handle)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await find_cases(client, "m", num_layers, 6, random.Random(0))

    assert len(asyncio.run(run())) == 6
    raee = [body.get("raee") for body in asked]
    if num_layers is None:
        assert set(raee) == {None} and all("max_tokens" in body for body in asked)
    else:
        assert {"task": "demo_sentiment"} in raee
        assert all(
            wish == {"task": "demo_sentiment"} or 1 <= wish["exit_layer"] <= 30 for wish in raee
        )
