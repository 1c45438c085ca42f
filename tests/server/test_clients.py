"""The examples in clients/ run as they stand against a server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.server

CLIENTS = Path(__file__).parents[2] / "clients"


def run(served, *command):
    """What an example prints on both channels; it must not fail."""
    environment = {**os.environ, "RAEE_BASE_URL": f"{served.url}/v1"}
    done = subprocess.run(
        command, cwd=CLIENTS, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_classify_answers_each_text_with_a_label_and_its_layer(served):
    lines = run(served, sys.executable, "classify.py").splitlines()
    assert len(lines) == 3
    assert all(line.split()[0] in ("great", "terrible") for line in lines)
    assert all("after layer" in line for line in lines)


def test_override_depth_shows_the_layer_it_asked_for(served):
    lines = run(served, sys.executable, "override_depth.py", "6", "full", "auto").splitlines()
    assert "layer  6 (override)" in lines[0]
    assert "layer 30 (override)" in lines[1]
    assert "layer" in lines[2]


def test_read_headers_prints_all_of_them(served):
    printed = run(served, sys.executable, "read_headers.py")
    assert "x-raee-exit-layer" in printed
    assert "demo_sentiment" in printed


def test_stream_states_its_depth_first(served):
    assert "[30 of 30 layers: unmatched]" in run(served, sys.executable, "stream.py")


def test_summarise_answers(served):
    assert run(served, sys.executable, "summarise.py").strip()


def test_curl_gets_decisions_and_the_error(served):
    printed = run(served, "bash", "curl.sh")
    assert printed.count("x-raee-reason") == 2
    assert "allowed: an integer in 1..30" in printed
