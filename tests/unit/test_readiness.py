"""/ready: the server takes requests, does not any more, or has lost its engine."""

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from raee_serve.server.engine_client import ABORT_S
from tests.unit.serving import Server

pytestmark = pytest.mark.unit


@pytest.fixture
def server():
    """Behind an API key, over an engine that is healthy until it is told to be dead."""
    server = Server(api_key="secret")

    async def check_health():
        if server.engine.is_dead:
            raise EngineDeadError

    server.engine.is_dead, server.engine.check_health = False, check_health
    server.engine.shutdown = lambda timeout: server.engine.stopped_within.append(timeout)
    server.engine.stopped_within = []
    return server


def ready(server, method="GET"):
    return server.post("/ready", method=method)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_healthy_server_is_ready_without_a_key_and_says_no_more(server, method):
    answer = ready(server, method)
    assert (answer.status_code, answer.content) == (200, b"")
    assert set(answer.headers) == {"content-length"}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_it_is_only_read(server, method):
    assert ready(server, method).status_code == 404  # vLLM knows no such route


@pytest.mark.parametrize("path", ["/ready/", "/readyz", "/v1/ready"])
def test_no_other_path_is_taken_from_vllm(server, path):
    assert server.post(path, method="GET").status_code in (401, 404)


def test_a_dead_engine_is_not_ready(server):
    server.engine.is_dead = True
    answer = ready(server)
    assert (answer.status_code, answer.content) == (503, b"")


def test_who_shuts_down_is_not_ready_and_its_engine_drains(server):
    server.app.state.engine_client.shutdown(timeout=30)
    assert server.engine.stopped_within == [30 + ABORT_S]
    answer = ready(server)
    assert (answer.status_code, answer.content) == (503, b"")
    headers = {"authorization": "Bearer secret"}
    assert server.post(prompt="a", headers=headers).status_code == 200  # the engine's to refuse
