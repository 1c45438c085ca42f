"""What goes wrong while the server runs, each with its exact outcome."""

import shutil

import pytest
from openai import BadRequestError
from transformers import AutoTokenizer

from tests.server.asking import complete, post
from tests.server.conftest import MODEL, NUM_LAYERS

pytestmark = pytest.mark.server

NAMED = {"task": "demo_sentiment"}


def test_deleting_the_table_disturbs_nothing(served, reviews):
    prompts = [f"{text} It was" for text in reviews[:4]]
    before = complete(served, prompts, raee=NAMED)
    assert before.reasons == ["retrieved"] * 4
    shutil.rmtree(served.table)
    after = complete(served, prompts, raee=NAMED)
    assert (after.layers, after.distances) == (before.layers, before.distances)
    assert after.reasons == before.reasons and not served.table.exists()


@pytest.mark.parametrize("raee", [None, NAMED, {"exit_layer": 5}])
def test_an_empty_prompt_gets_vllms_own_answer(served, raee):
    with pytest.raises(BadRequestError, match="prompt_embeds must be provided and non-empty"):
        complete(served, "", raee=raee)


def test_a_prompt_of_one_token(served):
    reply = complete(served, [[504]], raee=NAMED)
    assert reply.layers[0] <= NUM_LAYERS and reply.reasons[0] in ("retrieved", "far")
    assert complete(served, "I").reasons == ["unmatched"]
    early = complete(served, "I", raee={"exit_layer": 3}, max_tokens=4)
    assert early.layers == [3] and early.texts[0]


def test_a_prompt_of_five_thousand_tokens(served, smollm2, reviews):
    """The encoder sees its beginning only, which is the text of a table row."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(" ".join(reviews * 3)).input_ids[:5000]
    assert len(ids) == 5000
    prompt = tokenizer.decode(ids) + " It was"
    forced = complete(served, prompt, raee={"exit_layer": 3})
    assert (forced.layers, forced.reasons) == ([3], ["override"])
    reply = complete(served, prompt, raee=NAMED)
    assert reply.reasons == ["retrieved"] and reply.tasks == ["demo_sentiment"]
    assert reply.texts[0] in (" terrible", " great")


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"null", {"model": MODEL}, {"model": MODEL, "prompt": {"a": 1}},
     {"model": MODEL, "prompt": [["x"], 3]}, {"model": MODEL, "prompt": [10**9]}],
)  # fmt: skip
def test_malformed_bodies_get_vllms_own_errors(served, body):
    status, headers, answer = post(served, "/v1/completions", body)
    assert 400 <= status < 500 and "error" in answer
    assert "x-raee-exit-layer" not in {name.lower() for name in headers}


def test_half_a_surrogate_pair_is_no_text_to_look_up(served):
    limit = {"structured_outputs": {"choice": [" terrible", " great"]}}
    body = {"model": MODEL, "prompt": "\ud800 It was", "max_tokens": 1, **limit}
    status, _, _ = post(served, "/v1/completions", body)
    assert status in (200, 400)
    assert complete(served, "It was", raee=NAMED).layers  # and the server goes on


def test_an_unknown_model_is_vllms_404(served):
    status, headers, answer = post(served, "/v1/completions", {"model": "nobody", "prompt": "x"})
    assert status == 404 and answer["error"]["type"] == "NotFoundError"
    assert "x-raee-exit-layer" not in {name.lower() for name in headers}
