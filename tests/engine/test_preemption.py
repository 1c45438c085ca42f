"""Depths stay right when requests lose their KV blocks and are computed again."""

import random

import pytest
from vllm import SamplingParams

from raee_serve.engine.settings import engine_options, exit_args
from tests.engine.conftest import ENGINE_ARGS
from tests.engine.reference import greedy_mismatches
from tests.tiny import ENGINE_SIZES, saved, tiny_llama

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_REQUESTS, NUM_TOKENS = 6, 12, 200
KV_BYTES_PER_TOKEN = NUM_LAYERS * 2 * 2 * ENGINE_SIZES["head_dim"] * 4
"""Keys and values of two KV heads in float32, in every layer."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny_llama(NUM_LAYERS, **ENGINE_SIZES)
    return saved(model, tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def cramped(checkpoint):
    """An engine whose KV cache holds about a third of what the requests need together."""
    from vllm import LLM

    args = {
        **ENGINE_ARGS,
        "max_model_len": 512,
        "kv_cache_memory_bytes": KV_BYTES_PER_TOKEN * 128 * 12,
    }
    llm = LLM(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        disable_log_stats=False,
        **args,
        **engine_options(),
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()


def preemptions(llm):
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_preempted_requests_equal_cut_checkpoints(cramped, checkpoint):
    rng = random.Random(3)
    prompts = [
        [rng.randrange(5, ENGINE_SIZES["vocab_size"]) for _ in range(rng.choice([100, 180, 240]))]
        for _ in range(NUM_REQUESTS)
    ]
    depths = [1 + i % NUM_LAYERS for i in range(NUM_REQUESTS)]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args=exit_args(d),
        )
        for d in depths
    ]
    outputs = cramped.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    assert preemptions(cramped) > 0

    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    for depth in range(1, NUM_LAYERS + 1):
        at_depth = [i for i, d in enumerate(depths) if d == depth]
        wrong = greedy_mismatches(
            checkpoint,
            depth,
            [prompts[i] for i in at_depth],
            [tokens[i] for i in at_depth],
        )
        assert wrong == []
