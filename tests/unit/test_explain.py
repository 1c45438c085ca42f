"""`raee.explain`: the decision in the answer, and everything else of it as vLLM wrote it."""

import json

import pytest

from raee_serve.records import ExitDecision, Reason
from raee_serve.server.access import Access
from raee_serve.server.explain import raee_object
from tests.unit.serving import ALLOWED, NUM_LAYERS, Server

pytestmark = pytest.mark.unit

EXPLAIN = {"explain": True}


def events(answer):
    """The JSON of a stream's chunks."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n")]
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_without_it_the_answer_is_as_it_was():
    server = Server()
    plain = server.post(prompt="a It was", **ALLOWED)
    asked = server.post(prompt="a It was", raee={"explain": False}, **ALLOWED)
    assert plain.content == asked.content and b"raee" not in plain.content


def test_the_answer_says_why_and_is_otherwise_the_same():
    server = Server()
    plain = server.post(prompt=["a It was", "b"], **ALLOWED)
    answer = server.post(prompt=["a It was", "b"], raee=EXPLAIN, **ALLOWED)
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.content.startswith(plain.content[:-1] + b',"raee":')
    raee = answer.json()["raee"]
    assert raee["versions"]["table"] == 3
    assert raee["versions"]["raee-serve"] and raee["versions"]["vllm"].startswith("0.32")
    known, unknown = raee["prompts"]
    assert (known["exit_layer"], known["num_layers"]) == (5, NUM_LAYERS)
    assert (known["reason"], known["task"], known["distance"]) == ("retrieved", "sst2", 0.25)
    assert known["neighbours"] == [
        {"id": "row-a", "distance": 0.25, "label": "great"},
        {"id": "row-b", "distance": 0.5, "label": "terrible"},
    ]
    assert len(known["expected"]["probe"]) == NUM_LAYERS and known["expected"]["probe"][4] == 0.95
    assert known["choice"] == {"k": 2, "budget": 0.95, "max_distance": 0.6, "min_exit_layer": 1}
    assert (known["head"], known["certainty"]) == ("probe", 0.7)
    assert list(known["labels"].items()) == [("great", 0.75), ("terrible", 0.25)]
    assert "labels" not in unknown
    assert unknown["reason"] == "unmatched" and "neighbours" not in unknown


def test_a_decision_without_a_look_up_is_stated_alone():
    raee = Server().post(prompt="a", raee={"exit_layer": 9, **EXPLAIN}).json()["raee"]
    (prompt,) = raee["prompts"]
    assert (prompt["exit_layer"], prompt["reason"]) == (9, "override")
    assert "expected" not in prompt and "labels" not in prompt


def test_a_stream_has_it_in_its_first_chunk_only():
    server = Server()
    plain = server.post(prompt=["a It was", "b"], stream=True, **ALLOWED)
    answer = server.post(prompt=["a It was", "b"], stream=True, raee=EXPLAIN, **ALLOWED)
    first, *others = events(answer)
    assert first["raee"]["prompts"][0]["exit_layer"] == 5
    assert first["raee"]["prompts"][0]["labels"] == {"great": 0.75, "terrible": 0.25}
    del first["raee"]
    assert [first, *others] == events(plain) and len(others) == 2
    assert answer.text.startswith(": keep-alive\n\ndata: {")
    assert answer.text.endswith("data: [DONE]\n\n")


def test_an_error_carries_no_decision():
    answer = Server().post(prompt="bad", raee=EXPLAIN)
    assert answer.status_code == 400 and answer.json() == {"error": {"message": "bad prompt"}}


def test_it_can_be_switched_off():
    server = Server(access=Access(frozenset({"explain"})))
    answer = server.post(prompt="a It was", raee=EXPLAIN, **ALLOWED)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "raee.explain"
    assert server.post(prompt="a It was", **ALLOWED).status_code == 200
    preview = server.post("/v1/raee/preview", prompt="a It was", **ALLOWED)
    assert "neighbours" not in preview.json()["prompts"][0]


def test_a_restart_among_prompts_decided_as_one_is_told_of_all():
    decision = ExitDecision(5, NUM_LAYERS, Reason.OVERRIDE)
    assert raee_object([decision], None, {1})["prompts"][0]["restarted"] is True
