"""Requests of every length and depth that come, go and are aborted at random."""

import random

import pytest

from tests.engine.engines import tiny_engine
from tests.engine.traffic import random_requests, serve, wrong_tokens
from tests.kept import grown, kept
from tests.tiny import ENGINE_SIZES, saved, tiny_gemma3, tiny_llama

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_REQUESTS = 6, 1000
HALF = NUM_REQUESTS // 2
MODELS = {
    "llama": (tiny_llama, {}, {}),
    "gemma3-no-cache": (tiny_gemma3, {"sliding_window": 64}, {"enable_prefix_caching": False}),
}
"""Name to model, its configuration and engine arguments."""


@pytest.mark.parametrize("name", MODELS)
def test_no_wrong_token_no_lost_block_and_nothing_kept(name, tmp_path):
    make, config, engine_args = MODELS[name]
    checkpoint = saved(make(NUM_LAYERS, **ENGINE_SIZES, **config), tmp_path / name)
    rng = random.Random(9)
    requests = random_requests(rng, NUM_REQUESTS, NUM_LAYERS)

    with tiny_engine(checkpoint, **engine_args) as llm:
        serve(llm.llm_engine, requests[:HALF], rng)
        before = kept()
        serve(llm.llm_engine, requests[HALF:], rng)
        assert grown(before, by=HALF / 20) == {}
        assert before["raee_serve.engine.scheduler.TruncatingScheduler"]
        assert llm.reset_prefix_cache(), "vLLM frees the cache only when no block is held"

    done = [r for r in requests if r.finished]
    assert len(done) > 0.75 * NUM_REQUESTS
    assert all(len(r.tokens) == r.max_tokens for r in done)
    assert wrong_tokens(checkpoint, requests) == []
