"""How a server ends: killed engine, SIGTERM under load. It never hangs, and nothing is left."""

import contextlib
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from benchmarks.metrics_page import total
from raee_serve.evaluation.server_process import running_process
from tests.tiny import ENGINE_SIZES, WITH_TOKENIZER, tiny_llama, tokenized

pytestmark = pytest.mark.server

SHORT, LONG = 150, 7000
"""Tokens that are out long before, and long after, `TIME_TO_STOP_S` is over."""
TIME_TO_STOP_S = 8
PATIENCE_S = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, smollm2):
    sizes = {**ENGINE_SIZES, **WITH_TOKENIZER, "max_position_embeddings": 8192}
    model = tiny_llama(6, **sizes)
    return tokenized(model, tmp_path_factory.mktemp("tiny") / "model", smollm2)


@contextlib.contextmanager
def serving(checkpoint, *flags):
    """URL and process of a server, and its other processes."""
    command = [sys.executable, "-m", "raee_serve.cli", "serve", str(checkpoint), *flags]
    command += ["--exit-layer", "3", "--dtype", "float32", "--served-model-name", "tiny"]
    with running_process(command) as (url, process):
        yield url, process, psutil.Process(process.pid).children(recursive=True)


def ask(url, max_tokens, stream):
    """(status, finish reason, whether it ended properly); an error's status for a finish reason."""
    body = {"model": "tiny", "prompt": "one two", "max_tokens": max_tokens, "stream": stream}
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        answer = client.post("/v1/completions", json={**body, "ignore_eos": True})
    if not stream:
        content = answer.json()
        why = content["error"]["code"] if "error" in content else finish_reason(content)
        return answer.status_code, why, True
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    last = json.loads(events[-2])
    why = last["error"]["code"] if "error" in last else finish_reason(last)
    return answer.status_code, why, events[-1] == "[DONE]"


def finish_reason(answer):
    return answer["choices"][0]["finish_reason"]


@contextlib.contextmanager
def long_requests(url):
    """Four that are under way, two of them streams; their outcomes are there afterwards."""
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, url, LONG, stream) for stream in (True, True, False, False)]
        wait_until_begun(url, len(asked))
        outcomes = []
        yield outcomes
        outcomes += [request.result(PATIENCE_S) for request in asked]


def wait_until_begun(url, count):
    """Until that many requests of this server have their first token.

    How many run would not do: on a fast machine short ones are over between two looks.
    """
    deadline = time.monotonic() + PATIENCE_S
    while total(url, "vllm:time_to_first_token_seconds_count") < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_gone(processes):
    _, alive = psutil.wait_procs(processes, PATIENCE_S)
    assert not alive


def test_a_killed_worker_ends_the_server_with_an_error(checkpoint):
    with serving(checkpoint) as (url, server, processes):
        with long_requests(url) as outcomes:
            (killed,) = [process for process in processes if "Worker" in process.name()]
            os.kill(killed.pid, signal.SIGKILL)
        # Streams have begun with 200; the error is their last chunk.
        assert outcomes == [(200, 500, True)] * 2 + [(500, 500, True)] * 2
        assert server.wait(PATIENCE_S) == 1
        assert_gone(processes)


def test_on_sigterm_requests_are_told_that_they_are_not_answered(checkpoint):
    with serving(checkpoint) as (url, server, processes):
        with long_requests(url) as outcomes:
            server.send_signal(signal.SIGTERM)
        assert outcomes == [(200, "abort", True)] * 4
        assert server.wait(PATIENCE_S) == 0
        assert_gone(processes)


def test_on_sigterm_requests_are_answered_while_there_is_time(checkpoint):
    """Those that take longer than the time to stop end as they do without such a time."""
    time_to_stop = ("--shutdown-timeout", str(TIME_TO_STOP_S))
    with serving(checkpoint, *time_to_stop) as (url, server, processes):
        with long_requests(url) as outcomes, ThreadPoolExecutor(2) as pool:
            short = [pool.submit(ask, url, SHORT, stream) for stream in (True, False)]
            wait_until_begun(url, 4 + len(short))
            server.send_signal(signal.SIGTERM)
            assert [request.result(PATIENCE_S) for request in short] == [(200, "length", True)] * 2
        assert outcomes == [(200, "abort", True)] * 4
        assert server.wait(PATIENCE_S) == 0
        assert_gone(processes)
