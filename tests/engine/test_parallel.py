"""Tensor parallel: every rank follows the same plan."""

import pytest

from tests.engine.engines import generate_at, running_engine
from tests.engine.reference import mixed_mismatches
from tests.engine.workload import mixed_requests
from tests.tiny import ENGINE_SIZES, saved, tiny_llama

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_TOKENS = 6, 8
ARGS = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 27, "tensor_parallel_size": 2}


def test_two_ranks_equal_cut_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
    checkpoint = saved(tiny_llama(NUM_LAYERS, **ENGINE_SIZES), tmp_path / "llama")
    requests = mixed_requests(NUM_LAYERS, ENGINE_SIZES["vocab_size"], first_token=2)
    prompts, depths = [r.prompt for r in requests], [r.exit_layer for r in requests]

    with running_engine(checkpoint, **ARGS) as llm:
        tokens = generate_at(llm, prompts, depths, max_tokens=NUM_TOKENS)

    assert mixed_mismatches(checkpoint, depths, prompts, tokens) == []
