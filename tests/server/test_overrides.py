"""What a request may ask for, and how a bad wish is refused; nothing smuggled in has an effect."""

import pytest
from openai import BadRequestError

from tests.server.asking import complete, post
from tests.server.conftest import MODEL, NUM_LAYERS

pytestmark = pytest.mark.server

PROMPT = "The capital of France is"


@pytest.mark.parametrize(
    ("raee", "parameter", "allowed"),
    [
        ("full", "raee", "exit_layer, head, task, k, budget"),
        ({"layer": 3}, "raee.layer", "exit_layer, head, task, k, budget"),
        ({"exit_layer": 0}, "raee.exit_layer", "1..30, 'full' or 'auto'"),
        ({"exit_layer": 31}, "raee.exit_layer", "1..30, 'full' or 'auto'"),
        ({"exit_layer": True}, "raee.exit_layer", "1..30, 'full' or 'auto'"),
        ({"exit_layer": "half"}, "raee.exit_layer", "1..30, 'full' or 'auto'"),
        ({"exit_layer": 12.5}, "raee.exit_layer", "1..30, 'full' or 'auto'"),
        ({"task": "sst9"}, "raee.task", "demo_chat_sentiment, demo_sentiment"),
        ({"k": 0}, "raee.k", "1..1024"),
        ({"k": "12"}, "raee.k", "1..1024"),
        ({"head": "fused"}, "raee.head", "plain, shortcut, probe"),
        ({"budget": 1.5}, "raee.budget", "a number above 0 and at most 1"),
        ({"head": "probe", "exit_layer": 3}, "raee.head", "demo_chat_sentiment, demo_sentiment"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_a_bad_value_is_a_400_that_says_what_is_allowed(served, raee, parameter, allowed, chat):
    client = served.client
    create = client.chat.completions.create if chat else client.completions.create
    prompt = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    with pytest.raises(BadRequestError) as caught:
        create(model=MODEL, extra_body={"raee": raee}, **prompt)
    assert caught.value.status_code == 400
    assert caught.value.body["param"] == parameter
    assert caught.value.body["type"] == "BadRequestError"
    assert allowed in caught.value.body["message"]


def test_every_depth_can_be_asked_for(served):
    replies = {
        layer: complete(served, PROMPT, raee={"exit_layer": layer})
        for layer in (1, 8, 15, 22, 29, NUM_LAYERS)
    }
    for layer, reply in replies.items():
        assert (reply.layers, reply.reasons) == ([layer], ["override"])
    full = complete(served, PROMPT, raee={"exit_layer": "full"})
    assert full.texts == replies[NUM_LAYERS].texts == [" Paris"]
    said = [max(reply.logprobs[0].items(), key=lambda item: item[1]) for reply in replies.values()]
    assert len(set(said)) == len(said)  # every depth is another model


def test_auto_is_what_happens_without_it(served):
    reply = complete(served, PROMPT, raee={"exit_layer": "auto", "task": None})
    assert reply.reasons == ["unmatched"]


@pytest.mark.parametrize("smuggled", [1, 999, -5, "junk", [1, 2], 2.5])
def test_exit_keys_in_vllm_xargs_have_no_effect(served, smuggled):
    xargs = {"raee_exit_layer": smuggled, "raee_anything": "x", "mine": 1}
    plain = complete(served, PROMPT)
    reply = complete(served, [PROMPT, PROMPT], extra_body={"vllm_xargs": xargs})
    assert reply.layers == [NUM_LAYERS] * 2 and reply.texts == plain.texts * 2


@pytest.mark.parametrize("smuggled", [1, 999, "junk"])
def test_nor_on_routes_that_have_no_decisions(served, smuggled):
    body = {"model": MODEL, "input": "What is the capital of France?", "max_output_tokens": 8,
            "temperature": 0}  # fmt: skip
    _, headers, plain = post(served, "/v1/responses", body)
    body["vllm_xargs"] = {"raee_exit_layer": smuggled}
    status, _, answer = post(served, "/v1/responses", body)
    assert status == 200 and "x-raee-exit-layer" not in headers
    texts = [a["output"][0]["content"][0]["text"] for a in (plain, answer)]
    assert texts[0] == texts[1] != ""


def test_k_budget_and_head_reach_the_look_up(served, reviews):
    prompts = [f"{text} It was" for text in reviews[:6]]

    def layers(**raee):
        return complete(served, prompts, raee={"task": "demo_sentiment", **raee}).layers

    shallow, deep = layers(budget=0.6), layers(budget=1)
    assert sum(shallow) < sum(deep)
    assert layers(budget=1, k=1) != deep
    assert layers(head="plain") != layers(head="plain", k=40)


def test_a_probe_answers_at_every_depth(served, reviews):
    prompt = f"{reviews[0]} It was"
    for layer in (1, 8, NUM_LAYERS):
        reply = complete(served, prompt, raee={"task": "demo_sentiment", "exit_layer": layer})
        assert (reply.layers, reply.heads, reply.reasons) == ([layer], ["probe"], ["override"])
        plain = {"task": "demo_sentiment", "exit_layer": layer, "head": "plain"}
        assert complete(served, prompt, raee=plain).heads == ["plain"]
