"""POST /v1/raee/classify and GET /v1/raee/tasks."""

from dataclasses import replace

import pytest
from vllm.exceptions import VLLMValidationError

from raee_serve.engine.settings import EXIT_HEAD_KEY, exit_args
from raee_serve.errors import TaskError
from raee_serve.records import ExitDecision, Reason
from raee_serve.server.access import Access
from raee_serve.server.engine_client import DepthClient
from tests.unit.serving import LOOP, NUM_LAYERS, Server

pytestmark = pytest.mark.unit

CLASSIFY, TASKS = "/v1/raee/classify", "/v1/raee/tasks"


def classify(server, **body):
    answer = server.post(CLASSIFY, **{"task": "sst2", "input": "film", **body})
    return answer.status_code, answer.json()


def test_each_text_has_its_label_and_probabilities():
    server = Server(served_names=("base",))
    status, answer = classify(server, input=["film", "a book"])
    assert status == 200
    datum = {
        "label": "great",
        "probabilities": {"great": 0.75, "terrible": 0.25},
        "exit_layer": 5,
        "reason": "retrieved",
    }
    assert answer == {
        "object": "list",
        "model": "base",
        "data": [{"index": 0, **datum}, {"index": 1, **datum}],
        "usage": {"prompt_tokens": 6, "completion_tokens": 2, "total_tokens": 8},
    }
    assert server.looked_up == ["film", "a book"]
    assert [params.temperature for params in server.engine.params] == [0.0, 0.0]
    assert server.value("raee_decisions_total", reason="retrieved", task="sst2") == 2
    assert server.value("raee_exit_heads_total", head="probe", task="sst2") == 2
    assert not server.gate.probes._requests and not server.bodies


def test_one_text_needs_no_list():
    server = Server()
    server.engine.label = 0
    _, answer = classify(server)
    assert [datum["label"] for datum in answer["data"]] == ["terrible"]
    assert list(answer["data"][0]["probabilities"]) == ["terrible", "great"]


def test_options_are_those_of_a_raee_object():
    server = Server()
    _, answer = classify(server, exit_layer=9, budget=0.9, explain=True)
    (datum,) = answer["data"]
    assert (datum["exit_layer"], datum["reason"]) == (9, "override")
    assert datum["raee"]["head"] == "probe" and datum["raee"]["neighbours"]
    assert server.engine.params[0].extra_args[EXIT_HEAD_KEY] == "probe"


def test_the_lm_head_tells_the_label_alone():
    server = Server()
    server.engine.tokens = lambda layer: (10,)
    _, answer = classify(server, head="plain")
    assert answer["data"][0]["label"] == "terrible"
    assert answer["data"][0]["probabilities"] is None
    (params,) = server.engine.params
    assert params.allowed_token_ids == [10, 11] and params.extra_args == exit_args(5)


def test_a_prompt_that_is_far_has_a_label_too():
    server = Server()
    server.decision = ExitDecision.full(NUM_LAYERS, Reason.FAR, task="sst2")
    _, answer = classify(server)
    assert answer["data"][0]["reason"] == "far" and answer["data"][0]["label"] == "great"
    assert answer["data"][0]["exit_layer"] == NUM_LAYERS


@pytest.mark.parametrize(
    ("body", "field", "allowed"),
    [
        ({"task": "sst3"}, "task", "'sst3'; allowed: sst2"),
        ({"task": None}, "task", "None; allowed: sst2"),
        ({"task": ["sst2"]}, "task", "['sst2']; allowed: sst2"),
        ({"input": []}, "input", "a list of 0; allowed: a text, or 1..2 of them"),
        ({"input": ["a"] * 3}, "input", "a list of 3; allowed: a text, or 1..2 of them"),
        ({"input": 7}, "input", "input is 7; allowed: a text"),
        ({"input": ""}, "input", "input is ''; allowed: a text, not empty"),
        ({"input": ["a", " "]}, "input", "input[1] is ' '; allowed: a text, not empty"),
        ({"input": ["a", 5]}, "input", "input[1] is 5"),
        ({"texts": ["a"]}, "texts", "allowed: task, exit_layer, head, budget, explain, input"),
        ({"budget": 2}, "budget", "budget is 2; allowed: a number above 0"),
        ({"exit_layer": 31}, "exit_layer", "exit_layer is 31; allowed: an integer in 1..30"),
        ({"head": "shortcut"}, "head", "head is 'shortcut'"),
        ({"k": 3}, "k", "there is no field 'k'"),
    ],
)
def test_bad_input_is_named_with_what_is_allowed(body, field, allowed):
    server = Server(access=Access(max_prompts=2))
    status, answer = classify(server, **body)
    assert (status, answer["error"]["param"]) == (400, field)
    assert allowed in answer["error"]["message"]
    assert not server.looked_up and not server.engine.params


def test_half_a_character_is_no_text():
    raw = b'{"task": "sst2", "input": "\\ud800"}'
    answer = Server().post(CLASSIFY, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "input is '\\ud800'" in answer.json()["error"]["message"]


def test_a_server_without_label_tasks_says_so():
    status, answer = classify(Server(fixed_layer=3))
    assert status == 400 and "allowed: none here" in answer["error"]["message"]


def test_what_the_tokenizer_cannot_do_is_the_tasks_fault():
    server = Server()

    def encode(_):
        raise TaskError("this backbone's tokenizer has no chat template")

    gate = replace(server.gate, encode=encode)
    server.app.state.engine_client = DepthClient(server.engine, gate, LOOP)
    status, answer = classify(server)
    assert (status, answer["error"]["param"]) == (400, "task")


def test_the_engines_own_refusal_is_told_as_vllm_tells_it():
    server = Server()

    async def outputs(params):
        raise VLLMValidationError("the prompt is too long", parameter="input_tokens")
        yield

    server.engine.outputs = outputs
    status, answer = classify(server)
    assert status == 400 and answer["error"]["message"].startswith("the prompt is too long")
    assert server.value("raee_decisions_total", reason="retrieved", task="sst2") is None


def test_a_worker_without_the_probe_is_a_500():
    server = Server()
    server.engine.label = -1
    status, answer = classify(server)
    assert (status, answer["error"]["type"]) == (500, "InternalServerError")


def test_the_api_key_and_the_body_limit_hold():
    server = Server(api_key="secret", access=Access(max_body_bytes=50))
    assert server.post(CLASSIFY, task="sst2", input="a").status_code == 401
    key = {"authorization": "Bearer secret"}
    assert server.post(CLASSIFY, task="sst2", input="a", headers=key).status_code == 200
    assert server.post(CLASSIFY, task="sst2", input="a" * 50, headers=key).status_code == 413
    assert server.post(CLASSIFY, method="GET", headers=key).headers["allow"] == "POST"
    assert server.post(TASKS, method="GET").status_code == 401


def test_explaining_can_be_switched_off():
    server = Server(access=Access(frozenset({"explain"})))
    status, answer = classify(server, explain=True)
    assert (status, answer["error"]["param"]) == (400, "explain")
    assert classify(server)[0] == 200


def test_the_tasks_of_the_table_are_told():
    answer = Server().post(TASKS, method="GET").json()
    assert answer["object"] == "list"
    (task,) = answer["data"]
    assert (task["name"], task["kind"], task["labels"]) == ("sst2", "labels", ["terrible", "great"])
    assert (task["head"], task["rows"], task["template"]) == ("probe", 8, "{text} It was")
    plain = Server(head="plain").post(TASKS, method="GET").json()
    assert plain["data"][0]["head"] == "plain"
    assert Server(fixed_layer=3).post(TASKS, method="GET").json()["data"] == []
    assert Server().post(TASKS, prompt="a").headers["allow"] == "GET"
