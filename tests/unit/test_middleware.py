"""Admission around an application: what it changes, and all that it must leave alone."""

import asyncio
import json
from argparse import Namespace
from dataclasses import replace

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.sampling_params import SamplingParams

from raee_serve.engine.settings import EXIT_LAYER_KEY
from raee_serve.records import ExitDecision, Reason
from raee_serve.server.admission import Admission
from raee_serve.server.depths import PromptDepth, RequestDepths
from raee_serve.server.engine_client import DepthClient, at_depth
from raee_serve.server.gate import Gate
from raee_serve.server.limits import LabelOutputs
from raee_serve.server.lookup import LookupBatcher
from raee_serve.server.metrics import DecisionMetrics
from raee_serve.server.middleware import RaeeMiddleware
from raee_serve.server.reload import ReloadError, Snapshot
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

pytestmark = pytest.mark.unit

NUM_LAYERS = 30
TASK = Task("sst2", CompletionPrompt("{text} It was"), ("terrible", "great"))
SPELLINGS = {"terrible": 8, "great": 9, " terrible": 10, " great": 11}
LABELS = LabelOutputs(TASK.label_words, TASK.label_texts(), (10, 11), True, SPELLINGS)
DECISION = ExitDecision(5, NUM_LAYERS, Reason.RETRIEVED, "sst2", 0.25)


class FakeEngine:
    """Notes the parameters of every generation."""

    vllm_config = "the engine's own"

    def __init__(self):
        self.params = []

    def generate(self, prompt, sampling_params, request_id):
        self.params.append(sampling_params)
        return prompt, request_id


class Server:
    """An application in the place of vLLM's: one generation per prompt, one dict for all."""

    def __init__(self, *, fixed_layer=None, api_key=None):
        self.engine, self.looked_up, self.bodies = FakeEngine(), [], []
        self.decision = DECISION
        self.registry = CollectorRegistry()
        tasks, labels = ({}, {}) if fixed_layer else ({"sst2": TASK}, {"sst2": LABELS})
        gate = Gate(
            admission=Admission(NUM_LAYERS, tasks, labels, fixed_layer=fixed_layer),
            lookups=LookupBatcher(self.decide, num_layers=NUM_LAYERS, timeout_s=5),
            detokenize=lambda ids: " ".join("w" for _ in ids) + " It was",
            metrics=DecisionMetrics(NUM_LAYERS, self.registry),
        )
        paths = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
        guard = Middleware(AuthenticationMiddleware, tokens=[api_key] if api_key else [])
        self.app = Starlette(
            routes=[Route(path, self.endpoint, methods=["POST"]) for path in paths],
            middleware=[Middleware(RaeeMiddleware), *([guard] if api_key else [])],
        )
        self.app.state.args = Namespace(api_key=[api_key] if api_key else None)
        self.app.state.engine_client = DepthClient(self.engine, gate)

    def decide(self, lookups):
        self.looked_up += [lookup.key_text for lookup in lookups]
        return [self.decision for _ in lookups]

    async def endpoint(self, request):
        raw = await request.body()
        self.bodies.append(raw)
        if int(request.headers["content-length"]) != len(raw):
            return JSONResponse("content-length", 500)
        try:
            body = json.loads(raw)
            prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            return JSONResponse("no JSON object with a prompt", 400)
        if not all(isinstance(prompt, str | list) for prompt in prompts) or "bad" in prompts:
            return JSONResponse("bad prompt", 400)
        shared = body.get("vllm_xargs") or {}
        for n, prompt in enumerate(prompts):
            params = SamplingParams(extra_args=shared, skip_clone=True)
            request.app.state.engine_client.generate(prompt, params, f"cmpl-{n}")
        if body.get("stream"):
            return StreamingResponse(iter([b"data: [DONE]\n\n"]), media_type="text/event-stream")
        return JSONResponse("ok")

    def post(self, path="/v1/completions", *, content=None, headers=None, method="POST", **body):
        async def send():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                sent = {"content": content} if content is not None else {"json": body}
                return await client.request(method, path, **sent, headers=headers)

        return asyncio.run(send())

    def exit_layers(self):
        return [params.extra_args[EXIT_LAYER_KEY] for params in self.engine.params]


ALLOWED = {"allowed_token_ids": [10, 11]}


def test_each_prompt_has_its_own_depth_and_its_own_dict():
    server = Server()
    xargs = {"mine": 1, EXIT_LAYER_KEY: 2, "raee_other": "x"}
    answer = server.post(prompt=["a It was", "b", "c It was"], vllm_xargs=xargs, **ALLOWED)
    assert answer.status_code == 200
    assert server.exit_layers() == [5, NUM_LAYERS, 5]
    dicts = [params.extra_args for params in server.engine.params]
    assert all(set(d) == {"mine", EXIT_LAYER_KEY} for d in dicts)
    assert len({id(d) for d in dicts}) == 3
    assert server.looked_up == ["a", "c"]
    headers = answer.headers
    assert headers["x-raee-exit-layer"] == "5, 30, 5"
    assert headers["x-raee-num-layers"] == "30, 30, 30"
    assert headers["x-raee-reason"] == "retrieved, unmatched, retrieved"
    assert headers["x-raee-task"] == "sst2, -, sst2"
    assert headers["x-raee-distance"] == "0.2500, -, 0.2500"
    assert len(headers["x-raee-lookup-ms"].split(", ")) == 3


def test_a_stream_has_the_headers_too():
    answer = Server().post(prompt="a It was", stream=True, **ALLOWED)
    assert answer.headers["x-raee-exit-layer"] == "5"
    assert answer.text == "data: [DONE]\n\n"


def test_token_ids_are_matched_by_their_text():
    server = Server()
    assert server.post(prompt=[[1, 2], [3]], **ALLOWED).headers["x-raee-exit-layer"] == "5, 5"
    assert sorted(server.looked_up) == ["w", "w w"]


def test_the_body_that_goes_on_is_without_raee_and_limited():
    server = Server()
    assert server.post(prompt="film", raee={"task": "sst2"}).status_code == 200
    (raw,) = server.bodies
    assert json.loads(raw) == {"prompt": "film", "allowed_token_ids": [10, 11], "max_tokens": 1}
    assert server.looked_up == ["film"]


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


class Reloader:
    """In the place of a `TableReloader`, at version 3."""

    def __init__(self, gate, error=None):
        self.gate, self.error = replace(gate, reloader=self), error

    async def reload(self):
        if self.error:
            raise self.error
        return Snapshot(2, "a", {"sst2": 7}), Snapshot(3, "b", {"sst2": 8, "mr": 1})


def reloading(error=None, **options):
    server = Server(**options)
    gate = Reloader(server.app.state.engine_client.gate, error).gate
    server.app.state.engine_client = DepthClient(server.engine, gate)
    return server


def test_a_reload_says_what_was_and_what_is_loaded():
    answer = reloading().post("/v1/raee/reload", content=b"")
    assert answer.status_code == 200 and answer.json() == {
        "object": "raee.reload",
        "old": {"version": 2, "rows": 7, "tasks": {"sst2": 7}},
        "new": {"version": 3, "rows": 9, "tasks": {"sst2": 8, "mr": 1}},
    }


@pytest.mark.parametrize(
    ("path", "method", "status", "kind"),
    [
        ("/v1/raee/reload", "GET", 405, "MethodNotAllowedError"),
        ("/v1/raee/reload", "DELETE", 405, "MethodNotAllowedError"),
        ("/v1/raee/nothing", "POST", 404, "NotFoundError"),
        ("/v1/raee/", "POST", 404, "NotFoundError"),
    ],
)
def test_our_routes_take_posts_of_what_there_is(path, method, status, kind):
    answer = reloading().post(path, method=method)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)


def test_a_reload_that_fails_says_why():
    answer = reloading(ReloadError("version 2 stays loaded: because")).post("/v1/raee/reload")
    assert (answer.status_code, answer.json()["error"]["type"]) == (409, "ConflictError")
    assert answer.json()["error"]["message"] == "version 2 stays loaded: because"


def test_a_server_without_a_table_has_nothing_to_reload():
    answer = Server(fixed_layer=7).post("/v1/raee/reload")
    assert answer.status_code == 400 and "without an exit table" in answer.text


def test_our_routes_are_behind_the_api_key():
    server = reloading(api_key="secret")
    assert server.post("/v1/raee/reload").status_code == 401
    answer = server.post("/v1/raee/reload", headers={"authorization": "Bearer secret"})
    assert answer.status_code == 200


def test_other_content_types_and_routes_are_left_alone():
    server = Server()
    sent = json.dumps({"prompt": "a It was", "raee": {"k": 0}}).encode()
    assert server.post(content=sent, headers={"content-type": "text/plain"}).status_code == 200
    answer = server.post("/v1/responses", prompt="a It was", vllm_xargs={EXIT_LAYER_KEY: 3})
    assert "x-raee-exit-layer" not in answer.headers
    assert server.bodies[0] == sent and not server.looked_up
    assert server.exit_layers() == [NUM_LAYERS, NUM_LAYERS]


def test_errors_of_the_application_carry_no_decision():
    answer = Server().post(prompt="bad")
    assert answer.status_code == 400 and "x-raee-exit-layer" not in answer.headers


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
    assert [alike.take() for _ in range(4)] == [five] * 4
    assert [mixed.take() for _ in range(3)] == [five, nine, None]


def test_only_a_retrieved_exit_is_steered_to_the_first_tokens_of_its_choices():
    server = Server()
    limit = {"structured_outputs": {"choice": ["terrible", " great"]}}
    server.post(prompt=["a It was", "b"], **limit)
    server.post(prompt="a It was", raee={"exit_layer": 5}, **limit)
    server.post(prompt="a It was", **ALLOWED)
    assert [p.logit_bias for p in server.engine.params] == [{8: 100.0, 11: 100.0}, None, None, None]


def test_the_head_of_an_exit_biases_the_label_words_as_they_may_be_spelled():
    server = Server()
    server.decision = replace(DECISION, label_bias=(1.5, -2.0))
    server.post(prompt="a It was", **ALLOWED)
    limit = {"structured_outputs": {"choice": ["terrible", " great"]}}
    server.post(prompt="a It was", **limit)
    server.post(prompt="a It was", raee={"exit_layer": 5}, **ALLOWED)
    assert [p.logit_bias for p in server.engine.params] == [
        {10: 1.5, 11: -2.0},
        {8: 100.0, 11: 96.5},
        None,
    ]


def test_full_depth_has_a_head_too():
    server = Server()
    server.decision = ExitDecision(
        NUM_LAYERS, NUM_LAYERS, Reason.RETRIEVED, "sst2", 0.25, label_bias=(0.5, 0.0)
    )
    server.post(prompt="a It was", **ALLOWED)
    assert server.engine.params[0].logit_bias == {10: 0.5, 11: 0.0}


def test_a_clients_own_bias_is_kept():
    params = SamplingParams(logit_bias={10: 1.0, 5: 2.0})
    own = at_depth(params, PromptDepth(5, token_bias=((10, 1.5), (11, -1.0))))
    assert own.logit_bias == {10: 2.5, 5: 2.0, 11: -1.0}
    assert params.logit_bias == {10: 1.0, 5: 2.0}


def test_the_rest_of_the_engine_is_the_engines():
    server = Server()
    assert server.app.state.engine_client.vllm_config == "the engine's own"


def test_decisions_are_counted():
    server = Server()
    server.post(prompt=["a It was", "b"], **ALLOWED)
    value = server.registry.get_sample_value
    assert value("raee_decisions_total", {"reason": "retrieved", "task": "sst2"}) == 1
    assert value("raee_decisions_total", {"reason": "unmatched", "task": "-"}) == 1
    assert value("raee_exit_layer_bucket", {"le": "5.0"}) == 1
    assert value("raee_exit_layer_count") == 2
    assert value("raee_lookup_seconds_count") == 1
