"""Admission around an application: what it changes, and all that it must leave alone."""

import json
from dataclasses import replace

import pytest
from vllm.exceptions import GenerationError
from vllm.sampling_params import SamplingParams

from raee_serve.engine.settings import EXIT_HEAD_KEY, EXIT_LAYER_KEY, exit_args, probe_args
from raee_serve.records import ExitDecision, Reason
from raee_serve.server.depths import PromptDepth, RequestDepths
from raee_serve.server.engine_client import at_depth
from raee_serve.server.middleware import MAX_IN_HEADERS
from tests.kept import grown, kept
from tests.unit.serving import ALLOWED, DECISION, NUM_LAYERS, PLAIN, PROBES, Server

pytestmark = pytest.mark.unit

PROBE_ARGS = probe_args(5, PROBES.id, "sst2/5", (0.5, -0.5))
ALONE = probe_args(NUM_LAYERS, PROBES.id, "sst2/alone", (0.0, 0.0))


def test_each_prompt_has_its_own_depth_and_its_own_dict():
    server = Server()
    xargs = {"mine": 1, EXIT_LAYER_KEY: 2, "raee_other": "x"}
    answer = server.post(prompt=["a It was", "b", "c It was"], vllm_xargs=xargs, **ALLOWED)
    assert answer.status_code == 200
    assert server.exit_layers() == [5, NUM_LAYERS, 5]
    dicts = [params.extra_args for params in server.engine.params]
    ours = [{key for key in d if key.startswith("raee_")} for d in dicts]
    assert ours == [set(PROBE_ARGS), {EXIT_LAYER_KEY}, set(PROBE_ARGS)]
    assert all(d["mine"] == 1 for d in dicts)
    assert len({id(d) for d in dicts}) == 3
    assert server.looked_up == ["a", "c"]
    headers = answer.headers
    assert headers["x-raee-exit-layer"] == "5, 30, 5"
    assert headers["x-raee-exit-head"] == "probe, plain, probe"
    assert headers["x-raee-num-layers"] == "30, 30, 30"
    assert headers["x-raee-reason"] == "retrieved, unmatched, retrieved"
    assert headers["x-raee-task"] == "sst2, -, sst2"
    assert headers["x-raee-distance"] == "0.2500, -, 0.2500"
    assert len(headers["x-raee-lookup-ms"].split(", ")) == 3


def test_the_exit_head_reaches_the_engine_the_headers_and_the_metrics():
    server = Server(shortcut_layers=(22, 25))
    asked = {"exit_layer": 25, "head": "shortcut"}
    answer = server.post(prompt=["a It was", "b"], raee=asked, vllm_xargs={EXIT_HEAD_KEY: "x"})
    assert answer.headers["x-raee-exit-head"] == "shortcut, shortcut"
    server.post(prompt="a It was", raee={"exit_layer": 25}, vllm_xargs={EXIT_HEAD_KEY: "shortcut"})
    heads = [params.extra_args.get(EXIT_HEAD_KEY) for params in server.engine.params]
    assert heads == ["shortcut", "shortcut", None]
    server.decision = replace(PLAIN, head="shortcut")
    server.post(prompt="a It was", **ALLOWED)
    assert server.engine.params[-1].extra_args == exit_args(5, "shortcut")
    server.decision = DECISION
    server.post(prompt="a It was", **ALLOWED)
    assert server.engine.params[-1].extra_args == PROBE_ARGS
    for head, task, count in (
        ("shortcut", "-", 2),
        ("shortcut", "sst2", 1),
        ("plain", "-", 1),
        ("probe", "sst2", 1),
    ):
        assert server.value("raee_exit_heads_total", head=head, task=task) == count


def test_a_layer_without_a_shortcut_is_refused_by_name():
    server = Server(shortcut_layers=(22, 25))
    answer = server.post(prompt="a", raee={"exit_layer": 24, "head": "shortcut"})
    assert answer.status_code == 400 and not server.bodies
    assert answer.json()["error"]["param"] == "raee.head"
    assert "layers that have shortcuts: 22, 25" in answer.json()["error"]["message"]


def test_a_stream_has_the_headers_too():
    answer = Server().post(prompt="a It was", stream=True, **ALLOWED)
    assert answer.headers["x-raee-exit-layer"] == "5"
    assert answer.text.endswith("data: [DONE]\n\n") and "raee" not in answer.text


def test_token_ids_are_matched_by_their_text():
    server = Server()
    assert server.post(prompt=[[1, 2], [3]], **ALLOWED).headers["x-raee-exit-layer"] == "5, 5"
    assert sorted(server.looked_up) == ["w", "w w"]


def test_the_body_that_goes_on_is_without_raee_and_limited():
    server = Server()
    assert server.post(prompt="film", raee={"task": "sst2"}).status_code == 200
    (raw,) = server.bodies
    assert json.loads(raw) == {"prompt": "film", "max_tokens": 1}
    assert server.looked_up == ["film"]
    plain = {"task": "sst2", "head": "plain"}
    assert server.post(prompt="film", raee=plain).status_code == 200
    body = {"prompt": "film", "max_tokens": 1, "allowed_token_ids": [10, 11]}
    assert json.loads(server.bodies[1]) == body


def test_a_bad_option_is_an_openai_error_and_never_reaches_the_application():
    server = Server()
    answer = server.post(prompt="film", raee={"k": 0})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "BadRequestError" and error["code"] == 400
    assert error["param"] == "raee.k" and "1..1024" in error["message"]
    assert not server.bodies and "x-raee-exit-layer" not in answer.headers


@pytest.mark.parametrize(
    "raw", [b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"prompt": 7}', b"[" * 100_000, b"{}"]
)
def test_what_is_no_request_reaches_the_application_as_it_came(raw):
    server = Server()
    answer = server.post(content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert server.bodies == [raw]


def test_other_content_types_and_routes_are_left_alone():
    server = Server()
    sent = json.dumps({"prompt": "a It was", "raee": {"k": 0}}).encode()
    assert server.post(content=sent, headers={"content-type": "text/plain"}).status_code == 200
    answer = server.post("/v1/responses", prompt="a It was", vllm_xargs={EXIT_LAYER_KEY: 3})
    assert "x-raee-exit-layer" not in answer.headers
    assert server.bodies[0] == sent and not server.looked_up
    assert server.exit_layers() == [NUM_LAYERS, NUM_LAYERS]


def test_errors_of_the_application_carry_no_decision_and_are_not_counted():
    server = Server()
    answer = server.post(prompt=["a It was", "bad"], **ALLOWED)
    assert answer.status_code == 400 and "x-raee-exit-layer" not in answer.headers
    assert server.looked_up == ["a"]
    assert server.value("raee_decisions_total", reason="retrieved", task="sst2") is None
    server.post(prompt="a It was", **ALLOWED)
    assert server.value("raee_decisions_total", reason="retrieved", task="sst2") == 1


def test_a_long_list_has_the_first_decisions_in_its_headers():
    answer = Server().post(prompt=["b"] * 300, raee={"exit_layer": 5})
    assert answer.headers["x-raee-exit-layer"] == ", ".join(["5"] * MAX_IN_HEADERS)
    assert sum(len(f"{k}: {v}\r\n") for k, v in answer.headers.items()) < 8_000


def test_another_origin_may_read_our_own_answers():
    server, origin = Server(), {"origin": "https://page.example"}
    for answer in (
        server.post(prompt="film", raee={"k": 0}, headers=origin),
        server.post("/v1/raee/preview", prompt="a It was", headers=origin),
    ):
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
    answer = server.post(prompt="film", raee={"k": 0}, headers={"origin": "https://other.example"})
    assert answer.status_code == 400 and "access-control-allow-origin" not in answer.headers


def test_without_the_api_key_nothing_is_looked_up_and_nothing_about_options_is_told():
    server = Server(api_key="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}):
        answer = server.post(prompt="a It was", raee={"k": 0}, headers=headers)
        assert answer.status_code == 401
    assert not server.looked_up
    answer = server.post(prompt="a It was", headers={"authorization": "Bearer secret"}, **ALLOWED)
    assert answer.status_code == 200 and server.looked_up == ["a"]


def test_a_fixed_depth_reaches_routes_that_admission_does_not_read():
    server = Server(fixed_layer=7)
    assert server.post(prompt="a").headers["x-raee-reason"] == "override"
    server.post("/v1/responses", prompt="a")
    assert server.exit_layers() == [7, 7]


def test_more_generations_than_prompts_run_at_full_depth_unless_all_are_alike():
    five, nine = PromptDepth(5), PromptDepth(9)
    alike, mixed = RequestDepths([five, five]), RequestDepths([five, nine])
    assert [alike.take() for _ in range(4)] == [(n, five) for n in range(4)]
    assert [mixed.take() for _ in range(3)] == [(0, five), (1, nine), (2, None)]


CHOICE = {"structured_outputs": {"choice": ["terrible", " great"]}}


def test_only_a_retrieved_exit_by_the_lm_head_is_steered_to_first_tokens():
    server = Server(head="plain")
    server.post(prompt=["a It was", "b"], **CHOICE)
    server.post(prompt="a It was", raee={"exit_layer": 5}, **CHOICE)
    server.post(prompt="a It was", **ALLOWED)
    assert [p.logit_bias for p in server.engine.params] == [{8: 100.0, 11: 100.0}, None, None, None]
    server.post(prompt="a It was", raee={"head": "probe"}, **CHOICE)
    assert server.engine.params[-1].logit_bias is None


def test_a_clients_own_bias_is_kept_where_an_exit_is_steered():
    params = SamplingParams(logit_bias={10: 1.0, 5: 2.0})
    own = at_depth(params, PromptDepth(5, first_tokens=(10, 11)))
    assert own.logit_bias == {10: 100.0, 5: 2.0, 11: 99.0}
    assert params.logit_bias == {10: 1.0, 5: 2.0}


def test_a_label_is_answered_as_the_client_wants_it_written():
    server = Server()
    assert server.post(prompt="film", raee={"task": "sst2"}).json()["choices"] == [[" great"]]
    server.engine.label = 0
    limited = server.post(prompt=["a It was", "b"], **CHOICE).json()["choices"]
    assert limited == [["terrible"], ["[7, 8]"]]
    only = {"structured_outputs": {"choice": ["terrible"]}}
    server.post(prompt="film", raee={"task": "sst2"}, **only)
    assert server.engine.params[-1].extra_args["raee_probe_bias"] == [0.5, -1e9]


def test_a_named_task_is_answered_at_every_depth():
    server = Server()
    early = server.post(prompt="film", raee={"task": "sst2", "exit_layer": 3})
    assert early.headers["x-raee-reason"] == "override"
    assert early.headers["x-raee-exit-head"] == "probe"
    assert server.engine.params[-1].extra_args == probe_args(3, PROBES.id, "sst2/3", (0.5, -0.5))
    assert server.looked_up == ["film"]


@pytest.mark.parametrize("why", [Reason.FAR, Reason.NO_EVIDENCE, Reason.TIMEOUT, Reason.ERROR])
def test_a_named_task_falls_back_to_the_last_layers_probe_alone(why):
    server = Server()
    server.decision = ExitDecision.full(NUM_LAYERS, why, task="sst2")
    answer = server.post(prompt="film", raee={"task": "sst2"})
    assert answer.headers["x-raee-reason"] == why.value
    assert answer.headers["x-raee-exit-head"] == "probe"
    assert answer.headers["x-raee-exit-layer"] == str(NUM_LAYERS)
    assert server.engine.params[-1].extra_args == ALONE
    server.engine.label, only = 0, {"structured_outputs": {"choice": ["terrible"]}}
    server.post(prompt="film", raee={"task": "sst2"}, **only)
    assert server.engine.params[-1].extra_args["raee_probe_bias"] == [0.0, -1e9]
    recognised = server.post(prompt="a It was", **CHOICE)  # it limits itself: vanilla's answer
    assert recognised.headers["x-raee-exit-head"] == "plain"
    assert server.engine.params[-1].extra_args == exit_args(NUM_LAYERS)


def test_a_named_task_without_a_text_is_answered_too():
    server = Server()
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    answer = server.post("/v1/chat/completions", messages=messages, raee={"task": "sst2"})
    assert answer.headers["x-raee-reason"] == "unmatched" and not server.looked_up
    assert server.engine.params[-1].extra_args == ALONE


def test_without_a_temperature_a_label_is_the_most_probable_one():
    server = Server()
    for stated in ({}, {"temperature": 0.7}):
        server.post(prompt="film", raee={"task": "sst2"}, **stated)
    assert [params.temperature for params in server.engine.params] == [0.0, 0.7]


def test_a_worker_without_the_probe_fails_the_request_alone():
    server = Server()
    server.engine.label = -1
    with pytest.raises(GenerationError):
        server.post(prompt="film", raee={"task": "sst2"})
    server.engine.label = 1
    assert server.post(prompt="film", raee={"task": "sst2"}).status_code == 200


def test_probes_are_kept_while_a_request_is_under_way():
    server, probes = Server(), []
    respond = server.respond

    async def noting(*args):
        probes.append(dict(server.gate.probes._requests))
        return await respond(*args)

    server.respond = noting
    server.post(prompt="film", raee={"task": "sst2"})
    server.post(prompt="film", raee={"k": 0})
    assert probes == [{PROBES.id: 1}] and not server.gate.probes._requests


def test_the_rest_of_the_engine_is_the_engines():
    server = Server()
    assert server.app.state.engine_client.vllm_config is server.engine.vllm_config


def test_nothing_is_kept_of_a_request_that_is_over():
    server, rounds = Server(sample_full=1), 20

    def ask():
        for _ in range(rounds):
            told = server.post(prompt=["a It was", "b"], raee={"explain": True}, **ALLOWED)
            server.post(prompt="c", stream=True, raee={"exit_layer": 2, "loop_guard": True})
            refused = server.post(prompt="d", raee={"k": 0})
            assert (told.status_code, refused.status_code) == (200, 400)

    ask()
    before = kept()
    ask()
    assert grown(before, by=rounds) == {}
    assert before["raee_serve.server.gate.Gate"]
