"""The examples in clients/ run as they stand against a server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.server

CLIENTS = Path(__file__).parents[2] / "clients"
TOOLS = Path(sys.prefix) / "tools" / "bin" / "python"
"""Of the environment with what cannot be installed beside vLLM (make test installs it)."""


def run(served, *command):
    """What an example prints on both channels; it must not fail."""
    environment = {**os.environ, "RAEE_BASE_URL": f"{served.url}/v1"}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices
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


@pytest.mark.skipif(not TOOLS.exists(), reason=f"no {TOOLS} (make test installs it)")
@pytest.mark.parametrize("library", ["litellm", "langchain"])
def test_other_libraries_pass_the_raee_object_and_give_the_headers(served, library):
    printed = run(served, str(TOOLS), f"with_{library}.py")
    answered, streamed = (part.split("]") for part in printed.split("[layer ")[1:])
    assert answered[0] == "20 of 30: override" and answered[1].strip()
    assert streamed[0] == "30 of 30: unmatched" and streamed[1].strip()
