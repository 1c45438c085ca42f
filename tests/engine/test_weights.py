"""Weights of other kinds: replaced while serving, and quantized to int8."""

import pytest
import torch

from raee_serve.cut import cut_checkpoint
from tests.engine.engines import generate_at, run_vanilla, tiny_args, tiny_engine
from tests.engine.reference import mixed_mismatches
from tests.engine.workload import mixed_requests
from tests.int8 import int8_checkpoint
from tests.tiny import ENGINE_SIZES, saved, tiny_llama

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_TOKENS = 6, 8
INT8_DTYPE = "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"
"""vLLM's int8 kernel for AMX (`check_cpu_sgl_kernel`) takes no float32 activations."""
INT8_TIE = 1 / 32
"""As `tests.engine.reference.TIE`: two steps of bfloat16 between 2 and 4. At another depth, one
layer more, the median is 0.5."""


@pytest.fixture
def requests():
    return mixed_requests(NUM_LAYERS, ENGINE_SIZES["vocab_size"], first_token=2)


def test_reloaded_weights_run_at_every_depth(tmp_path, requests):
    old, new = (
        saved(tiny_llama(NUM_LAYERS, seed=seed, **ENGINE_SIZES), tmp_path / str(seed))
        for seed in (0, 1)
    )
    prompts, depths = [r.prompt for r in requests], [r.exit_layer for r in requests]
    with tiny_engine(old) as llm:
        before = generate_at(llm, prompts, depths, max_tokens=NUM_TOKENS)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(new)})
        llm.reset_prefix_cache()
        after = generate_at(llm, prompts, depths, max_tokens=NUM_TOKENS)
    assert mixed_mismatches(old, depths, prompts, before) == []
    assert mixed_mismatches(new, depths, prompts, after) == []


def test_int8_equals_the_cut_int8_checkpoint(tmp_path, requests):
    source = saved(tiny_llama(NUM_LAYERS, **ENGINE_SIZES), tmp_path / "llama")
    checkpoint = int8_checkpoint(source, tmp_path / "int8")
    prompts, depths = [r.prompt for r in requests], [r.exit_layer for r in requests]
    with tiny_engine(checkpoint, dtype=INT8_DTYPE) as llm:
        tokens = generate_at(llm, prompts, depths, max_tokens=NUM_TOKENS)

    depth = NUM_LAYERS // 2
    cut = cut_checkpoint(checkpoint, depth, tmp_path / "cut")
    at_depth = [i for i, d in enumerate(depths) if d == depth]
    forced = [prompts[i] + tokens[i] for i in at_depth]
    fields = [{"max_tokens": 1, "prompt_logprobs": 1, "detokenize": False}] * len(forced)
    engine = {**tiny_args(cut), "dtype": INT8_DTYPE}
    (vanilla,) = run_vanilla([cut], forced, fields, **engine)
    behind = [
        max(at.values()) - at[str(token)]
        for i, outcome in zip(at_depth, vanilla, strict=True)
        for token, at in zip(tokens[i], outcome["prompt_logprobs"][-NUM_TOKENS:], strict=True)
    ]
    assert len(behind) == NUM_TOKENS * len(at_depth) and max(behind) <= INT8_TIE
