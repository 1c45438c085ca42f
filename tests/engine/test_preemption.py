"""Depths stay right when requests lose their KV blocks and are computed again."""

import random

import pytest

from tests.engine.engines import generate_at, preemptions, tiny_engine
from tests.engine.reference import mixed_mismatches
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
    args = {
        "max_model_len": 512,
        "kv_cache_memory_bytes": KV_BYTES_PER_TOKEN * 128 * 12,
        "disable_log_stats": False,
    }
    with tiny_engine(checkpoint, **args) as llm:
        yield llm


def test_preempted_requests_equal_cut_checkpoints(cramped, checkpoint):
    rng = random.Random(3)
    prompts = [
        [rng.randrange(5, ENGINE_SIZES["vocab_size"]) for _ in range(rng.choice([100, 180, 240]))]
        for _ in range(NUM_REQUESTS)
    ]
    depths = [1 + i % NUM_LAYERS for i in range(NUM_REQUESTS)]

    tokens = generate_at(cramped, prompts, depths, max_tokens=NUM_TOKENS)

    assert preemptions(cramped) > 0
    assert mixed_mismatches(checkpoint, depths, prompts, tokens) == []
