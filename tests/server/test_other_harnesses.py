"""Other projects' load generator and evaluation harness against the server, unmodified."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.metrics_page import page
from benchmarks.serving_systems import decided_in
from raee_serve.tasks.registry import get_task
from tests.conftest import REPOSITORY
from tests.server.conftest import MODEL, NUM_LAYERS

pytestmark = pytest.mark.server

PROMPTS = 6
LM_EVAL = shutil.which("lm_eval")
"""In an environment of its own, put on PATH: with what it needs half a gigabyte, so not in CI's."""


@pytest.fixture
def decided(served):
    """What the server has decided since the test began."""
    before = decided_in(page(served.url))
    return lambda: decided_in(page(served.url)).since(before)


def run(*command):
    """It must not fail, nor ask a hub for anything."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("asked", ["full", "retrieved"])
def test_vllm_bench_serve(served, smollm2, reviews, tmp_path, decided, asked):
    prompts = [{"prompt": get_task("demo_sentiment").render(text)} for text in reviews[:PROMPTS]]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(p)}\n" for p in prompts))
    command = [sys.executable, "-m", "benchmarks.bench_serve", "--base-url", served.url]
    command += ["--model", MODEL, "--tokenizer", smollm2, "--num-prompts", PROMPTS]
    command += ["--dataset-name", "custom", "--dataset-path", tmp_path / "prompts.jsonl"]
    command += ["--skip-chat-template", "--custom-output-len", 1, "--temperature", 0]
    command += ["--save-result", "--result-dir", tmp_path, "--result-filename", "result.json"]
    raee = {"exit_layer": "full"} if asked == "full" else {"task": "demo_sentiment"}
    run(*command, "--extra-body", json.dumps({"raee": raee}))
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (PROMPTS, PROMPTS)
    reasons = decided().reasons
    assert reasons.total() >= PROMPTS  # it warms up
    if asked == "full":
        assert set(reasons) == {"override"}
    else:
        assert reasons["retrieved"] >= 1 and not {"unmatched", "unconstrained"} & set(reasons)


@pytest.mark.skipif(LM_EVAL is None, reason="no lm_eval on PATH")
def test_lm_eval_scores_at_full_depth_and_answers_at_retrieved_exits(
    served, smollm2, tmp_path, decided
):
    server = f"model={MODEL},base_url={served.url}/v1/completions,num_concurrent=4"
    tokenizer = f"tokenizer_backend=huggingface,tokenizer={smollm2}"
    command = [LM_EVAL, "--model", "local-completions", "--model_args", f"{server},{tokenizer}"]
    command += ["--include_path", "clients/lm_eval", "--limit", PROMPTS]

    def score(task):
        run(*command, "--tasks", task, "--output_path", tmp_path / task)
        [file] = (tmp_path / task).rglob("results_*.json")
        found = json.loads(file.read_text())["results"][task]
        [value] = [v for k, v in found.items() if k.startswith(("acc,", "exact_match,"))]
        return value

    assert 0 <= score("raee_demo_scored") <= 1
    made = decided()
    assert made.prompts >= 2 * PROMPTS  # each label word is scored
    assert made.layers == NUM_LAYERS * made.prompts
    assert 0.5 <= score("raee_demo_retrieved") <= 1
    assert decided().since(made).reasons["retrieved"] >= 1
