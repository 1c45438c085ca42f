"""A server behind an API key that runs prompts at both depths, has a least one, and an adapter."""

import time
from types import SimpleNamespace

import pytest
from openai import APIStatusError, BadRequestError, OpenAI

from benchmarks.metrics_page import total
from raee_serve.cli import main
from raee_serve.evaluation.run import PATIENT_TIMEOUT_MS
from raee_serve.evaluation.server_process import running_server
from raee_serve.server.sampling import agreement
from tests.server.asking import post
from tests.tiny import (
    ADAPTER_RANK,
    ENGINE_SIZES,
    WITH_TOKENIZER,
    tiny_llama,
    tokenized,
    write_adapter,
)

pytestmark = pytest.mark.server

NUM_LAYERS, KEY, MAX_BYTES = 6, "secret", 100_000
PREVIEW = "/v1/raee/preview"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, smollm2):
    """url and client of a server of `tiny`, with a table of its exits, and of an `adapter` on it.

    A request runs two of the six layers at least.
    """
    directory = tmp_path_factory.mktemp("guarded")
    sizes, table = {**ENGINE_SIZES, **WITH_TOKENIZER}, ["--table", str(directory / "table")]
    checkpoint = tokenized(tiny_llama(NUM_LAYERS, **sizes), directory / "model", smollm2)
    write_adapter(tiny_llama(NUM_LAYERS, **sizes), directory / "adapter", seed=1)
    build = ["build", "--model", str(checkpoint), "--task", "demo_sentiment", "--limit", "24"]
    assert main([*build, *table]) == 0
    flags = [*table, "--min-exit-layer", "2", "--sample-full", "1", "--api-key", KEY]
    flags += ["--disable-explain", "--max-prompts", "8", "--max-body-bytes", str(MAX_BYTES)]
    flags += ["--lookup-timeout-ms", str(PATIENT_TIMEOUT_MS), "--served-model-name", "tiny"]
    flags += ["--enable-lora", "--lora-modules", f"adapter={directory / 'adapter'}"]
    # A slot more than there are adapters: docs/features.md, "A limit of vLLM itself".
    flags += ["--max-lora-rank", str(ADAPTER_RANK), "--max-loras", "2", "--dtype", "float32"]
    with running_server(str(checkpoint), flags) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        yield SimpleNamespace(url=url, client=client)


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
    names = ("raee_reruns_total", "raee_agreement_sum", "raee_agreement_count")
    before = {name: total(guarded.url, name) for name in names}
    prompts = ["one two three", "the film was", "Paris is"]
    full = ask(guarded, prompts, exit_layer="full")
    assert total(guarded.url, names[0]) == before[names[0]]  # nothing to compare with
    early = ask(guarded, prompts, exit_layer=3)
    deadline = time.monotonic() + 60
    while total(guarded.url, names[0]) < before[names[0]] + len(prompts):
        assert time.monotonic() < deadline, "the second runs did not end"
        time.sleep(0.2)
    reruns, shares, count = (total(guarded.url, name) - before[name] for name in names)
    assert reruns == count == len(prompts)
    assert shares == pytest.approx(sum(map(agreement, early, full)))


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
    body = {"prompt": "a", "raee": {"exit_layer": 3}}
    assert post(guarded, PREVIEW, body)[0] == 401
    assert post(guarded, "/v1/raee/nothing", {})[0] == 401
    key = {"authorization": f"Bearer {KEY}"}
    status, _, answer = post(guarded, PREVIEW, body, key)
    assert status == 200 and answer["prompts"][0]["exit_layer"] == 3


def ask_of_task(guarded, model, **raee):
    """(exit layer, reason) of a request that names a task of the table."""
    answer = guarded.client.completions.with_raw_response.create(
        model=model,
        prompt="A warm and funny film. It was",
        extra_body={"raee": {"task": "demo_sentiment", **raee}},
    )
    assert answer.parse().choices[0].text.strip()
    return int(answer.headers["x-raee-exit-layer"]), answer.headers["x-raee-reason"]


def test_an_adapter_without_a_table_runs_at_full_depth(guarded):
    assert ask_of_task(guarded, "adapter") == (NUM_LAYERS, "adapter")


def test_the_backbone_beside_it_still_looks_up(guarded):
    assert ask_of_task(guarded, "tiny")[1] in ("retrieved", "no-evidence", "far")


def test_an_adapter_may_be_asked_for_at_a_depth(guarded):
    assert ask_of_task(guarded, "adapter", exit_layer=2) == (2, "override")
