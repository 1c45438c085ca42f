"""Our own routes: who may call them, and what they answer."""

import json
from dataclasses import replace

import pytest

from raee_serve.server.access import Access
from raee_serve.server.engine_client import DepthClient
from raee_serve.server.reload import ReloadError, Snapshot
from tests.unit.serving import ALLOWED, LOOP, Server

pytestmark = pytest.mark.unit

PREVIEW, RELOAD = "/v1/raee/preview", "/v1/raee/reload"


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
    gate = Reloader(server.gate, error).gate
    server.app.state.engine_client = DepthClient(server.engine, gate, LOOP)
    return server


def error(answer):
    return answer.status_code, answer.json()["error"]["type"], answer.json()["error"]["param"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", [PREVIEW, RELOAD])
def test_another_method_is_a_405(method, path):
    answer = Server().post(path, method=method, prompt="a")
    assert error(answer) == (405, "MethodNotAllowedError", None)
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/raee/", "/v1/raee/nothing", "/v1/raee/preview/x"])
def test_an_unknown_route_is_a_404(path):
    assert error(Server().post(path, prompt="a")) == (404, "NotFoundError", None)


@pytest.mark.parametrize("path", [PREVIEW, RELOAD])
def test_a_switched_off_route_is_a_404(path):
    server = reloading(access=Access(frozenset({"preview", "reload"})))
    assert error(server.post(path, prompt="a")) == (404, "NotFoundError", None)


@pytest.mark.parametrize("path", [PREVIEW, RELOAD, "/v1/raee/nothing"])
def test_the_api_key_guards_every_route(path):
    server = Server(api_key="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}):
        assert server.post(path, prompt="a It was", headers=headers, **ALLOWED).status_code == 401
    assert not server.looked_up
    authorized = {"authorization": "Bearer secret"}
    assert server.post(PREVIEW, prompt="a", headers=authorized).status_code == 200


@pytest.mark.parametrize(
    ("raw", "parameter"),
    [
        (b"{", None),
        (b"[]", None),
        (b"", None),
        (b"[" * 100_000, None),
        (b"{}", "prompt"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": 7}', "prompt"),
        (b'{"messages": "hello"}', "messages"),
        (b'{"messages": [], "prompt": "a"}', "prompt"),
        (b'{"prompt": "a", "raee": {"k": 0}}', "raee.k"),
        (b'{"prompt": "a", "raee": {"\\ud800": 0}}', "raee.\\ud800"),
    ],
)
def test_a_bad_body_is_a_400_that_names_the_field(raw, parameter):
    server = Server()
    answer = server.post(PREVIEW, content=raw, headers={"content-type": "application/json"})
    assert error(answer) == (400, "BadRequestError", parameter)


def test_another_content_type_is_a_400():
    answer = Server().post(PREVIEW, content=b"{}", headers={"content-type": "text/plain"})
    assert error(answer) == (400, "BadRequestError", None)


def test_a_preview_decides_and_runs_nothing():
    server = Server()
    answer = server.post(PREVIEW, prompt=["a It was", "b"], **ALLOWED)
    known, unknown = answer.json()["prompts"]
    assert (known["exit_layer"], known["neighbours"][0]["id"]) == (5, "row-a")
    assert unknown["reason"] == "unmatched"
    assert server.looked_up == ["a"] and not server.engine.params and not server.bodies
    assert server.value("raee_decisions_total", reason="retrieved", task="sst2") is None


def test_a_preview_takes_what_the_endpoints_take():
    server = Server()
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    assert server.post(PREVIEW, **chat).json()["prompts"][0]["reason"] == "unmatched"
    named = server.post(PREVIEW, prompt="film", raee={"task": "sst2"}).json()["prompts"][0]
    assert named["reason"] == "retrieved"
    fixed = server.post(PREVIEW, prompt="film", raee={"exit_layer": 4}).json()["prompts"][0]
    assert (fixed["exit_layer"], fixed["reason"]) == (4, "override")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", PREVIEW])
@pytest.mark.parametrize("is_stated", [True, False])
def test_a_large_body_is_a_413_before_anything_is_done(path, is_stated):
    server = Server(access=Access(max_body_bytes=100))
    raw = json.dumps({"prompt": "a" * 100}).encode()

    async def chunks():
        for start in range(0, len(raw), 10):
            yield raw[start : start + 10]

    headers = {"content-type": "application/json"}
    answer = server.post(path, content=raw if is_stated else chunks(), headers=headers)
    assert error(answer) == (413, "RequestTooLargeError", None)
    assert not server.bodies
    small = {"messages": [{"content": "a"}]} if "chat" in path else {"prompt": "a"}
    assert server.post(path, **small).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", PREVIEW])
def test_too_many_prompts_are_a_400(path):
    server = Server(access=Access(max_prompts=2))
    answer = server.post(path, prompt=["a It was"] * 3, **ALLOWED)
    assert error(answer) == (400, "BadRequestError", "prompt")
    assert "at most 2" in answer.json()["error"]["message"] and not server.looked_up
    assert server.post(path, prompt=["a It was"] * 2, **ALLOWED).status_code == 200


def test_an_error_repeats_only_the_beginning_of_what_was_sent():
    answer = Server().post(prompt="a", raee={"task": "x" * 100_000})
    assert answer.status_code == 400 and len(answer.content) < 1000


def test_a_reload_says_what_was_and_what_is_loaded():
    answer = reloading().post(RELOAD, content=b"")
    assert answer.status_code == 200 and answer.json() == {
        "object": "raee.reload",
        "old": {"version": 2, "rows": 7, "tasks": {"sst2": 7}},
        "new": {"version": 3, "rows": 9, "tasks": {"sst2": 8, "mr": 1}},
    }


def test_a_reload_that_fails_says_why():
    answer = reloading(ReloadError("version 2 stays loaded: because")).post(RELOAD)
    assert (answer.status_code, answer.json()["error"]["type"]) == (409, "ConflictError")
    assert answer.json()["error"]["message"] == "version 2 stays loaded: because"


def test_a_server_without_a_table_has_nothing_to_reload():
    answer = Server(fixed_layer=7).post(RELOAD)
    assert answer.status_code == 400 and "without an exit table" in answer.text
