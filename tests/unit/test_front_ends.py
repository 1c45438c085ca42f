"""vLLM's other front ends are refused by name: prompts would reach the engine undecided."""

import pytest

from raee_serve.server.vllm_server import ServeError, parse_serve_args

pytestmark = pytest.mark.unit


def test_grpc_is_refused():
    with pytest.raises(ServeError, match=r"--grpc: admission reads HTTP requests"):
        parse_serve_args(["model", "--grpc"])


def test_the_rust_front_end_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ServeError, match=r"VLLM_USE_RUST_FRONTEND: admission runs in Python"):
        parse_serve_args(["model"])


def test_one_that_is_switched_off_is_not_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    assert parse_serve_args(["model"]).model_tag == "model"


def test_several_are_all_named(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ServeError) as caught:
        parse_serve_args(["model", "--grpc", "--headless", "--api-server-count", "0"])
    for name in ("--grpc", "VLLM_USE_RUST_FRONTEND", "--headless", "--api-server-count 0"):
        assert name in str(caught.value)
