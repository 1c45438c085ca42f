"""Tensor parallel: every rank follows the same plan."""

import pytest

from raee_serve.engine.settings import exit_args
from raee_serve.exits.probes import packed
from tests.engine.engines import generate_at, generate_with, running_engine
from tests.engine.probing import random_probes, requests_through, wrong_labels
from tests.engine.reference import mixed_mismatches
from tests.engine.workload import mixed_requests
from tests.tiny import ENGINE_SIZES, saved, tiny_llama

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_TOKENS = 6, 8
PROBES = random_probes({"two": 2, "six": 6})
LARGE = random_probes({f"large {i}": 500 for i in range(100)})
"""Of 25 MB: more than vLLM's queue to the workers takes in one piece."""
ARGS = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 27, "tensor_parallel_size": 2}


def test_two_ranks_equal_cut_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
    checkpoint = saved(tiny_llama(NUM_LAYERS, **ENGINE_SIZES), tmp_path / "llama")
    requests = mixed_requests(NUM_LAYERS, ENGINE_SIZES["vocab_size"], first_token=2)
    prompts, depths = [r.prompt for r in requests], [r.exit_layer for r in requests]

    by_probe = requests_through(PROBES, "set", prompts, depths)
    args = [r.extra_args for r in by_probe]
    args[::2] = map(exit_args, depths[::2])

    with running_engine(checkpoint, **ARGS) as llm:
        tokens = generate_at(llm, prompts, depths, max_tokens=NUM_TOKENS)
        assert llm.collective_rpc("load_probes", args=("set", packed(PROBES | LARGE))) == [None] * 2
        with pytest.raises(Exception, match="collective_rpc method failed"):
            llm.collective_rpc("load_probes", args=("set", b"no probes"))
        mixed = generate_with(llm, prompts, args, max_tokens=NUM_TOKENS)
        alone = generate_with(llm, prompts, [r.extra_args for r in by_probe], logprobs=2)

    assert mixed_mismatches(checkpoint, depths, prompts, tokens) == []
    assert [o["completions"][0]["token_ids"] for o in mixed[::2]] == tokens[::2]
    assert wrong_labels(checkpoint, by_probe[1::2], PROBES, mixed[1::2]) == []
    assert wrong_labels(checkpoint, by_probe, PROBES, alone) == []
