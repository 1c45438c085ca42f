"""One answer, one label: whatever lengths and stops a client's library fills in."""

import json
from math import exp

import pytest

from tests.server.asking import LABELS, complete, post
from tests.server.conftest import MODEL, NUM_LAYERS

pytestmark = pytest.mark.server

NAMED = {"task": "demo_sentiment"}
CHAT = {"task": "demo_chat_sentiment"}
CHOICE = {"structured_outputs": {"choice": list(LABELS)}}
ODD = "0x7f 0x45 0x4c 0x46; SELECT * FROM pg_stat_activity WHERE pid = 1"
"""Of no task."""

FILLED_IN = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 24},
    {"max_completion_tokens": 24},
    {"max_tokens": 100_000},
    {"max_tokens": 24, "min_tokens": 8},
    {"min_tokens": 8},
    {"stop": ["gr", "ter", " "]},
    {"stop_token_ids": [1109, 2]},
    {"bad_words": ["great", "terrible"]},
    {"ignore_eos": True, "max_tokens": 24},
    {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 2},
    {"logit_bias": {"1": 100, "2": -100}},
    {"temperature": 0.5, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 3},
]
"""What client libraries send without being asked."""


def ask(served, prompt, *, stream=False, chat=False, raee=None, **fields):
    """(text, finish reason, usage) of a request as it stands, through either endpoint."""
    body = {"model": MODEL, **fields, **({} if raee is None else {"raee": raee})}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if not stream:
        status, _, answer = post(served, path, body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        text = choice["message"]["content"] if chat else choice["text"]
        return text, choice["finish_reason"], answer["usage"]["completion_tokens"]
    counted = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(served, path, body | counted)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = [c["delta"].get("content") or "" if chat else c["text"] for c in choices]
    return "".join(texts), choices[-1]["finish_reason"], chunks[-1]["usage"]["completion_tokens"]


def events(served, path, body):
    raw = served.client._client.post(f"{served.url}{path}", json=body)
    assert raw.status_code == 200, raw.text
    lines = [line.removeprefix("data: ") for line in raw.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", FILLED_IN, ids=str)
def test_a_named_task_answers_with_one_label(served, reviews, fields, stream):
    said = ask(served, f"{reviews[0]} It was", raee=NAMED, stream=stream, **fields)
    assert said[0] in LABELS and said[1:] == ("stop", 1)
    said = ask(served, reviews[0], chat=True, raee=CHAT, stream=stream, **fields)
    assert said[0] in ("negative", "positive") and said[1:] == ("stop", 1)


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 1}, {"max_tokens": 24}, {"stop": ["gr"]}])
def test_so_does_a_prompt_that_is_recognised_and_limits_itself(served, reviews, fields):
    prompt = f"{reviews[0]} It was"
    assert ask(served, prompt, **CHOICE, **fields)[0] in LABELS
    bare = {"structured_outputs": {"choice": ["terrible", "great"]}}
    assert ask(served, prompt, **bare, **fields)[0] in ("terrible", "great")


def test_only_some_of_the_labels_may_be_allowed(served, reviews):
    prompt = f"{reviews[0]} It was"
    for label in LABELS:
        only = {"structured_outputs": {"choice": [label]}}
        reply = complete(served, prompt, extra_body=only)
        assert (reply.texts, reply.heads, list(reply.logprobs[0])) == ([label], ["probe"], [label])
        named = complete(served, prompt, raee=NAMED, extra_body=only)
        assert named.texts == [label] and named.logprobs[0][label] == pytest.approx(0, abs=1e-3)


def test_an_enum_of_a_schema_is_no_limit_to_labels(served, reviews):
    schema = {"name": "label", "schema": {"enum": ["terrible", "great"]}}
    wanted = {"response_format": {"type": "json_schema", "json_schema": schema}}
    reply = complete(served, f"{reviews[0]} It was", raee=NAMED, max_tokens=16, extra_body=wanted)
    assert (reply.reasons, reply.layers) == (["unconstrained"], [NUM_LAYERS])
    assert json.loads(reply.texts[0]) in ("terrible", "great")


def test_several_draws_are_labels(served, reviews):
    reply = complete(served, f"{reviews[0]} It was", raee=NAMED, n=8, temperature=1, max_tokens=24)
    assert len(reply.texts) == 8 and set(reply.texts) <= set(LABELS)
    again = [
        complete(served, f"{reviews[0]} It was", raee=NAMED, n=8, temperature=2, seed=5).texts
        for _ in range(2)
    ]
    assert again[0] == again[1]


def test_logprobs_are_the_labels(served, reviews):
    reply = complete(served, f"{reviews[0]} It was", raee={**NAMED, "explain": True}, logprobs=5)
    assert set(reply.logprobs[0]) == set(LABELS)
    assert sum(map(exp, reply.logprobs[0].values())) == pytest.approx(1, abs=1e-3)
    body = {"model": MODEL, "prompt": f"{reviews[0]} It was", "raee": {**NAMED, "explain": True}}
    labels = post(served, "/v1/completions", body)[2]["raee"]["prompts"][0]["labels"]
    told = {label.strip(): round(exp(p), 2) for label, p in reply.logprobs[0].items()}
    assert {label: round(p, 2) for label, p in labels.items()} == pytest.approx(told, abs=0.02)
    assert list(labels.values()) == sorted(labels.values(), reverse=True)
    raw = served.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": reviews[0]}],
        logprobs=True,
        top_logprobs=2,
        extra_body={"raee": CHAT},
    )
    (token,) = raw.choices[0].logprobs.content
    assert token.token == raw.choices[0].message.content
    assert {top.token for top in token.top_logprobs} == {"negative", "positive"}


def test_a_prompt_that_is_scored_goes_the_plain_way(served, reviews):
    prompt = f"{reviews[0]} It was"
    for fields in ({"echo": True}, {"extra_body": {"prompt_logprobs": 1}}):
        reply = complete(served, prompt, raee=NAMED, logprobs=1, **fields)
        assert (reply.reasons, reply.layers) == (["unconstrained"], [NUM_LAYERS])
    echoed = complete(served, prompt, raee=NAMED, echo=True, logprobs=None)
    assert echoed.heads == ["probe"] and echoed.texts[0] in [prompt + label for label in LABELS]


def test_what_is_far_is_answered_with_a_label_where_the_task_is_named(served):
    reply = complete(served, f"{ODD} It was", raee=NAMED)
    assert (reply.reasons, reply.layers, reply.heads) == (["far"], [NUM_LAYERS], ["probe"])
    assert reply.texts[0] in LABELS
    only = {"structured_outputs": {"choice": [LABELS[0]]}}
    assert complete(served, f"{ODD} It was", raee=NAMED, extra_body=only).texts == [LABELS[0]]
    recognised = complete(served, f"{ODD} It was", extra_body=CHOICE)
    assert (recognised.reasons, recognised.heads) == (["far"], ["plain"])


def test_texts_are_classified(served, reviews):
    body = {"task": "demo_sentiment", "input": [*reviews[:4], ODD]}
    status, _, answer = post(served, "/v1/raee/classify", body)
    assert status == 200 and answer["model"] == MODEL
    reply = complete(served, [f"{text} It was" for text in body["input"]], raee=NAMED)
    found = answer["data"]
    assert [f" {datum['label']}" for datum in found] == reply.texts
    assert [datum["exit_layer"] for datum in found] == reply.layers
    assert [datum["reason"] for datum in found] == reply.reasons
    for datum, logprobs in zip(found, reply.logprobs, strict=True):
        assert sum(datum["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        assert datum["probabilities"][datum["label"]] == pytest.approx(
            exp(logprobs[f" {datum['label']}"]), abs=0.02
        )
    assert answer["usage"]["completion_tokens"] == len(found)
    status, _, answer = post(served, "/v1/raee/classify", {**body, "task": "demo_chat_sentiment"})
    assert status == 200
    assert {datum["label"] for datum in answer["data"]} <= {"negative", "positive"}
    plain = {**body, "head": "plain", "input": reviews[0]}
    status, _, answer = post(served, "/v1/raee/classify", plain)
    assert status == 200 and answer["data"][0]["probabilities"] is None
    too_long = {**body, "input": "word " * 9000}
    status, _, answer = post(served, "/v1/raee/classify", too_long)
    assert status == 400 and "maximum model length" in answer["error"]["message"]
