"""What an operator and a curious client see: explanations, previews, vanilla on demand, metrics."""

import urllib.error
import urllib.request

import pytest

from benchmarks.metrics_page import page
from tests.server.asking import complete, decisions, post
from tests.server.conftest import MODEL, NUM_LAYERS, ROWS

pytestmark = pytest.mark.server

NAMED = {"task": "demo_sentiment"}
PREVIEW = "/v1/raee/preview"


def ask(served, prompt, stream=False, **raee):
    return served.client.completions.create(
        model=MODEL,
        prompt=prompt,
        temperature=0,
        stream=stream,
        stream_options={"include_usage": True} if stream else None,
        extra_body={"raee": {**NAMED, **raee}},
    )


def test_an_answer_says_why_when_asked(served, reviews):
    prompts = [f"{text} It was" for text in reviews[:3]]
    plain, told = ask(served, prompts), ask(served, prompts, explain=True)
    assert told.usage == plain.usage
    assert [c.text for c in told.choices] == [c.text for c in plain.choices]
    assert "raee" not in (plain.model_extra or {})
    raee = told.model_extra["raee"]
    assert len(raee["prompts"]) == 3
    for prompt in raee["prompts"]:
        assert (prompt["reason"], prompt["head"]) == ("retrieved", "probe")
        assert sum(prompt["labels"].values()) == pytest.approx(1, abs=1e-3)
        assert prompt["neighbours"][0]["distance"] == prompt["distance"]
        shares = prompt["expected"]["probe"]
        assert len(shares) == NUM_LAYERS
        first = next(n for n, s in enumerate(shares, 1) if s >= 0.98 * max(shares) - 1e-5)
        assert (prompt["exit_layer"], prompt["choice"]["budget"]) == (first, 0.98)
    assert raee["versions"]["table"] >= 1
    assert not any(text in str(raee) for text in reviews)


def test_a_stream_says_why_in_its_first_chunk(served, reviews):
    prompt = f"{reviews[0]} It was"
    plain = list(ask(served, prompt, stream=True))
    first, *others = ask(served, prompt, stream=True, explain=True)
    assert first.model_extra["raee"]["prompts"][0]["reason"] == "retrieved"
    assert not any("raee" in (chunk.model_extra or {}) for chunk in others)
    texts = [choice.text for chunk in [first, *others] for choice in chunk.choices]
    assert texts == [choice.text for chunk in plain for choice in chunk.choices]
    assert others[-1].usage == plain[-1].usage and len(plain) == 1 + len(others)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_says_why(served, stream):
    answer = served.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=4,
        temperature=0,
        stream=stream,
        extra_body={"raee": {"explain": True, "exit_layer": 9}},
    )
    chunks = list(answer) if stream else [answer]
    (prompt,) = chunks[0].model_extra["raee"]["prompts"]
    assert (prompt["exit_layer"], prompt["reason"]) == (9, "override")
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_preview_is_what_the_request_would_get(served, reviews):
    body = {"prompt": [f"{text} It was" for text in reviews[:4]], "raee": NAMED}
    status, _, answer = post(served, PREVIEW, body)
    assert status == 200
    reply = complete(served, body["prompt"], raee=NAMED)
    assert [p["exit_layer"] for p in answer["prompts"]] == reply.layers
    assert [f"{p['distance']:.4f}" for p in answer["prompts"]] == reply.distances
    assert all(p["neighbours"] for p in answer["prompts"])


def test_our_routes_refuse_in_openais_format(served):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(served.url + PREVIEW, timeout=30)
    assert caught.value.code == 405
    status, _, answer = post(served, "/v1/raee/nothing", {})
    assert (status, answer["error"]["type"]) == (404, "NotFoundError")
    status, _, answer = post(served, PREVIEW, {"prompt": "a", "raee": {"k": 0}})
    assert (status, answer["error"]["param"]) == (400, "raee.k")


def test_off_is_vanilla_for_one_request(served, reviews):
    prompt = f"{reviews[0]} It was"
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 6}
    _, _, plain = post(served, "/v1/completions", body)
    _, headers, answer = post(
        served, "/v1/completions", {**body, "raee": {**NAMED, "off": True, "exit_layer": 2}}
    )
    found = decisions({name.lower(): value for name, value in headers.items()})
    assert (found["reasons"], found["layers"]) == (["off"], [NUM_LAYERS])
    assert answer["choices"][0]["text"] == plain["choices"][0]["text"]


def test_look_ups_are_measured_by_stage(served, reviews):
    complete(served, [f"{reviews[5]} It was"] * 2, raee=NAMED)
    told = page(served.url)
    for stage in ("wait", "encode", "search", "aggregate"):
        assert f'raee_lookup_stage_seconds_count{{stage="{stage}"}}' in told
    assert 'raee_cache_total{result="hit"}' in told
    assert f'raee_table_rows{{task="demo_sentiment"}} {ROWS}.0' in told
    assert 'raee_layers_saved_total{task="demo_sentiment"}' in told
    assert 'raee_exit_layer_bucket{le="30.0",task="demo_sentiment"}' in told


def test_a_seeded_prompt_may_be_longer_than_a_step(served, smollm2):
    """Vanilla vLLM's engine stops at it on CPU; here it gives the same tokens twice."""
    ids = [1000 + n % 1500 for n in range(2600)]  # vLLM's steps are of 2,048 tokens here
    replies = [
        complete(served, [ids], seed=5, temperature=0.8, max_tokens=4, raee={"exit_layer": layer})
        for layer in (30, 30, 8)
    ]
    assert replies[0].texts == replies[1].texts and replies[2].texts
