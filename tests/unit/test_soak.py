"""`benchmarks.soak` sees what it is there to see."""

import asyncio
import json
from collections import Counter

import httpx
import pytest

from benchmarks.soak import Case, is_sound, soak

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
