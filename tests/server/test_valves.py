"""A server behind an API key that runs prompts at both depths and has a least one."""

import time
from types import SimpleNamespace

import pytest
from openai import APIStatusError, BadRequestError, OpenAI

from raee_serve.evaluation.metrics_page import total
from raee_serve.evaluation.server_process import running_server
from raee_serve.server.sampling import agreement
from tests.server.asking import post
from tests.tiny import ENGINE_SIZES, WITH_TOKENIZER, tiny_llama, tokenized

pytestmark = pytest.mark.server

NUM_LAYERS, KEY, MAX_BYTES = 6, "secret", 100_000
PREVIEW = "/v1/raee/preview"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, smollm2):
    """url and client of a tiny model's server, every request at two of six layers."""
    model = tiny_llama(NUM_LAYERS, **{**ENGINE_SIZES, **WITH_TOKENIZER})
    checkpoint = tokenized(model, tmp_path_factory.mktemp("tiny") / "model", smollm2)
    flags = ["--exit-layer", "3", "--min-exit-layer", "2", "--sample-full", "1"]
    flags += ["--api-key", KEY, "--disable-explain", "--max-prompts", "8", "--dtype", "float32"]
    flags += ["--max-body-bytes", str(MAX_BYTES)]
    with running_server(str(checkpoint), [*flags, "--served-model-name", "tiny"]) as url:
        yield SimpleNamespace(url=url, client=OpenAI(base_url=f"{url}/v1", api_key=KEY))


def ask(guarded, prompt, **raee):
    """Token ids of each prompt's greedy answer."""
    answer = guarded.client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=6,
        temperature=0,
        extra_body={"raee": raee, "return_token_ids": True, "ignore_eos": True},
    )
    return [choice.token_ids for choice in answer.choices]


def test_answers_are_compared_with_those_at_full_depth(guarded):
    prompts = ["one two three", "the film was", "Paris is"]
    full = ask(guarded, prompts, exit_layer="full")
    assert total(guarded.url, "raee_reruns_total") == 0  # nothing to compare with
    early = ask(guarded, prompts)
    deadline = time.monotonic() + 60
    while total(guarded.url, "raee_reruns_total", outcome="compared") < len(prompts):
        assert time.monotonic() < deadline, "the second runs did not end"
        time.sleep(0.2)
    expected = sum(map(agreement, early, full))
    assert total(guarded.url, "raee_agreement_sum") == pytest.approx(expected)
    assert total(guarded.url, "raee_agreement_count") == len(prompts)


def test_less_than_the_least_layer_is_refused(guarded):
    assert ask(guarded, "a", exit_layer=2)
    with pytest.raises(BadRequestError, match=r"allowed on this server .*: 2\.\.6"):
        ask(guarded, "a", exit_layer=1)


def test_what_is_switched_off_or_too_large_is_refused(guarded):
    with pytest.raises(BadRequestError, match="--disable-explain"):
        ask(guarded, "a", explain=True)
    with pytest.raises(BadRequestError, match="at most 8"):
        ask(guarded, ["a"] * 9)
    with pytest.raises(APIStatusError) as caught:
        ask(guarded, "a" * MAX_BYTES)
    assert caught.value.status_code == 413


def test_our_routes_want_the_api_key(guarded):
    assert post(guarded, PREVIEW, {"prompt": "a"})[0] == 401
    assert post(guarded, "/v1/raee/nothing", {})[0] == 401
    status, _, answer = post(guarded, PREVIEW, {"prompt": "a"}, {"authorization": f"Bearer {KEY}"})
    assert status == 200 and answer["prompts"][0]["exit_layer"] == 3
