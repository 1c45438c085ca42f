"""The ordinary ways to call the server, each with its decision in the headers and in the answer."""

import asyncio

import pytest
from openai import AsyncOpenAI
from transformers import AutoTokenizer

from benchmarks.metrics_page import page
from tests.server.asking import LABELS, complete, decisions
from tests.server.conftest import MODEL, NUM_LAYERS

pytestmark = pytest.mark.server

CHOICE = {"structured_outputs": {"choice": list(LABELS)}}
FREE = "Once upon a time"


def prompts_of(reviews, count):
    return [f"{review} It was" for review in reviews[:count]]


def close(one, other):
    """Whether two first-token distributions are the same but for bf16 batch noise.

    Those of a label's probe are over the labels.
    """
    return set(one) == set(other) and all(abs(one[t] - other[t]) < 0.3 for t in one)


@pytest.fixture(scope="module")
def shallow(served, reviews):
    """A limited prompt that was decided to leave before full depth, and its reply."""
    for prompt in prompts_of(reviews, 40):
        reply = complete(served, prompt, extra_body=CHOICE)
        if reply.layers[0] < NUM_LAYERS:
            return prompt, reply
    pytest.fail("no prompt of the table's own texts leaves early")


def test_the_model_has_the_name_that_was_typed(served):
    assert [model.id for model in served.client.models.list()] == [MODEL]


def test_a_string_is_answered_at_its_retrieved_depth(served, shallow):
    prompt, reply = shallow
    assert reply.reasons == ["retrieved"] and reply.tasks == ["demo_sentiment"]
    assert reply.heads == ["probe"] and set(reply.logprobs[0]) == set(LABELS)
    assert 0 <= float(reply.distances[0]) <= 2
    assert reply.texts[0] in LABELS
    forced = complete(served, prompt, raee={"exit_layer": reply.layers[0]}, extra_body=CHOICE)
    full = complete(served, prompt, raee={"exit_layer": "full"}, extra_body=CHOICE)
    assert close(reply.logprobs[0], forced.logprobs[0])
    assert reply.logprobs[0] != full.logprobs[0]  # another depth, however alike they answer


def test_each_prompt_of_a_list_has_its_own_decision(served, shallow):
    prompt, alone = shallow
    reply = complete(served, [FREE, prompt, FREE], extra_body=CHOICE)
    assert reply.reasons == ["unmatched", "retrieved", "unmatched"]
    assert reply.layers == [NUM_LAYERS, alone.layers[0], NUM_LAYERS]
    assert reply.tasks == ["-", "demo_sentiment", "-"]
    assert reply.distances[0] == "-" and reply.distances[1] == alone.distances[0]
    assert close(reply.logprobs[1], alone.logprobs[0])


@pytest.mark.parametrize("nested", [False, True])
def test_token_ids_are_decided_as_their_text(served, shallow, smollm2, nested):
    prompt, alone = shallow
    ids = AutoTokenizer.from_pretrained(smollm2)(prompt).input_ids
    reply = complete(served, [ids, ids] if nested else ids, extra_body=CHOICE)
    assert reply.layers == alone.layers * (2 if nested else 1)
    assert set(reply.reasons) == {"retrieved"}


def test_naming_the_task_limits_the_output_to_its_labels(served, reviews):
    for text in reviews[:4]:
        reply = complete(served, f"{text} It was", raee={"task": "demo_sentiment"}, max_tokens=None)
        assert reply.texts[0] in LABELS and reply.reasons == ["retrieved"]
    unmatched = complete(served, FREE, raee={"task": "demo_sentiment", "exit_layer": "full"})
    assert unmatched.texts[0] in LABELS and unmatched.layers == [NUM_LAYERS]


def test_unlimited_and_unknown_prompts_run_at_full_depth(served, reviews):
    (prompt,) = prompts_of(reviews, 1)
    unlimited = complete(served, prompt)
    assert (unlimited.reasons, unlimited.layers) == (["unconstrained"], [NUM_LAYERS])
    unknown = complete(served, FREE)
    assert (unknown.reasons, unknown.layers) == (["unmatched"], [NUM_LAYERS])
    odd = "0x7f 0x45 0x4c 0x46; SELECT * FROM pg_stat_activity WHERE pid = 1"
    far = complete(served, f"{odd} It was", extra_body=CHOICE)
    assert (far.reasons, far.layers) == (["far"], [NUM_LAYERS])
    full = complete(served, FREE, raee={"exit_layer": "full"})
    assert close(unknown.logprobs[0], full.logprobs[0])


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_chat_is_decided_by_its_message(served, reviews, in_parts):
    template = "Is this review negative or positive? Answer with one word.\n\nReview: {}"
    text = template.format(reviews[0])
    content = [{"type": "text", "text": text}] if in_parts else text
    raw = served.client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        extra_body={"raee": {"task": "demo_chat_sentiment"}},
    )
    found = decisions(raw.headers)
    assert found["reasons"] == ["retrieved"] and found["tasks"] == ["demo_chat_sentiment"]
    assert raw.parse().choices[0].message.content in ("negative", "positive")


def test_streams_carry_the_headers(served, shallow):
    prompt, alone = shallow
    raw = served.client.completions.with_raw_response.create(
        model=MODEL, prompt=prompt, max_tokens=3, stream=True, extra_body=CHOICE, temperature=0
    )
    assert decisions(raw.headers)["layers"] == alone.layers
    assert "".join(chunk.choices[0].text for chunk in raw.parse()) in LABELS
    raw = served.client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": FREE}], max_tokens=3, stream=True
    )
    assert decisions(raw.headers)["reasons"] == ["unmatched"]
    assert len(list(raw.parse())) > 1


def test_many_requests_at_once_keep_their_own_depths(served, reviews):
    prompts = prompts_of(reviews, 32)
    serial = [complete(served, prompt, extra_body=CHOICE).layers[0] for prompt in prompts[:8]]

    async def ask(client, prompt, raee):
        raw = await client.completions.with_raw_response.create(
            model=MODEL, prompt=prompt, max_tokens=1, extra_body={**CHOICE, "raee": raee}
        )
        return decisions(raw.headers)["layers"][0]

    async def all_at_once():
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none")
        options = [{} if n % 2 == 0 else {"exit_layer": 1 + n % NUM_LAYERS} for n in range(32)]
        asked = zip(prompts[:8] * 2 + prompts[8:24], [{}] * 8 + options[8:], strict=False)
        return options, await asyncio.gather(*(ask(client, *one) for one in asked))

    options, layers = asyncio.run(all_at_once())
    assert layers[:8] == serial
    asked = [option["exit_layer"] for option in options[9::2]]
    assert layers[9::2] == asked


def test_n_answers_of_one_prompt_have_one_decision(served, shallow):
    prompt, alone = shallow
    reply = complete(served, prompt, n=3, temperature=1, extra_body=CHOICE)
    assert reply.layers == alone.layers and len(reply.texts) == 3
    assert set(reply.texts) <= set(LABELS)


def test_decisions_are_counted_on_vllms_metrics_page(served, shallow):
    told = page(served.url)
    assert 'raee_decisions_total{reason="retrieved",task="demo_sentiment"}' in told
    assert "raee_exit_layer_bucket" in told and "raee_lookup_seconds_sum" in told
    assert "vllm:prompt_tokens_total" in told
