"""Invariants 1 and 2 on a GPU, eager and from captured graphs. Not run where there is none."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from raee_serve.engine.settings import engine_options
from tests.engine.engines import generate_at, run_vanilla, tiny_args, tiny_engine, worker_of
from tests.engine.reference import mixed_mismatches
from tests.tiny import ENGINE_SIZES, saved, tiny_gemma3, tiny_llama

pytestmark = pytest.mark.gpu

NUM_LAYERS, CHUNK = 6, 64
POINTS = (2, 4, 6)
LENS = (150, 12, 5, 40, 90, 3)
CHANGES = {
    "max_num_batched_tokens": CHUNK,
    "attention_backend": "TRITON_ATTN",  # takes float32
}


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def checkpoint(request, tmp_path_factory):
    model = request.param(NUM_LAYERS, **ENGINE_SIZES)
    return saved(model, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "graphs"])
def llm(request, checkpoint):
    options = engine_options(exit_points=POINTS)
    with tiny_engine(checkpoint, **CHANGES, **options, enforce_eager=request.param) as llm:
        yield llm


def prompts_of(seed):
    rng = random.Random(seed)
    return [[rng.randrange(5, ENGINE_SIZES["vocab_size"]) for _ in range(n)] for n in LENS]


def is_eager(llm):
    return llm.llm_engine.model_config.enforce_eager


@pytest.mark.parametrize("depths", [(2, 6, 4, 2, 6, 4), (4,) * 6, (1, 6, 3, 5, 2, 4)], ids=str)
def test_depths_equal_cut_checkpoints(llm, checkpoint, depths):
    """Mixed, of one depth, and off the exit points; the longest prompts take three chunks."""
    prompts = prompts_of(1)
    for _ in range(2):  # the second time from cached prefixes
        tokens = generate_at(llm, prompts, depths, max_tokens=24)
        assert mixed_mismatches(checkpoint, depths, prompts, tokens) == []


def test_decode_steps_are_replayed(llm):
    graphs = worker_of(llm).model_runner.model_state._graphs
    if is_eager(llm):
        assert graphs is None
        return
    replayed = []
    run = graphs.run
    graphs.run = lambda *args: replayed.append(1) or run(*args)
    generate_at(llm, prompts_of(2), [2, 4, 6, 2, 4, 6], max_tokens=8)
    assert len(replayed) >= 6


def test_full_depth_equals_vanilla(llm, checkpoint):
    prompts = prompts_of(3)
    ours = generate_at(llm, prompts, [NUM_LAYERS] * len(prompts), max_tokens=24)
    greedy = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
    changes = {**tiny_args(checkpoint), **CHANGES, "enforce_eager": is_eager(llm)}
    (vanilla,) = run_vanilla([checkpoint], prompts, [greedy] * len(prompts), **changes)
    assert ours == [v["completions"][0]["token_ids"] for v in vanilla]
