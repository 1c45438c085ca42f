"""The KV cache by depth in an engine: tokens, memory and reuse."""

import random

import pytest
from vllm import SamplingParams

from raee_serve.engine.segments import Segment
from raee_serve.engine.settings import engine_options, exit_args
from tests.engine.engines import generate_at, preemptions, tiny_engine
from tests.engine.reference import mixed_mismatches
from tests.engine.traffic import random_requests, serve, wrong_tokens
from tests.engine.workload import mixed_requests
from tests.kept import grown, kept
from tests.tiny import ENGINE_SIZES, saved, tiny_llama

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_SEGMENTS, BLOCK, NUM_REQUESTS = 6, 3, 32, 150
BLOCK_BYTES = NUM_LAYERS // NUM_SEGMENTS * BLOCK * 2 * 2 * ENGINE_SIZES["head_dim"] * 4
"""Keys and values of two KV heads in float32, in the layers of one segment."""
BY_DEPTH = {**engine_options(kv_segments=NUM_SEGMENTS), "block_size": BLOCK}
CRAMPED = {**BY_DEPTH, "max_model_len": 768, "kv_cache_memory_bytes": BLOCK_BYTES * 120}
OUTPUT_LENS = (1, 8, 64, 128)
"""Some are long enough to run out of blocks."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny_llama(NUM_LAYERS, **ENGINE_SIZES)
    return saved(model, tmp_path_factory.mktemp("tiny") / "llama")


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def test_no_wrong_token_and_no_lost_block_in_a_small_pool(checkpoint):
    rng = random.Random(9)
    requests, half = random_requests(rng, NUM_REQUESTS, NUM_LAYERS, OUTPUT_LENS), NUM_REQUESTS // 2
    with tiny_engine(checkpoint, **CRAMPED, disable_log_stats=False) as llm:
        serve(llm.llm_engine, requests[:half], rng)
        before = kept()
        serve(llm.llm_engine, requests[half:], rng)
        assert grown(before, by=half / 10) == {}
        assert before["raee_serve.engine.kv_cache.SegmentManager"]
        manager = scheduler_of(llm).kv_cache_manager
        assert preemptions(llm) > 0
        assert manager.usage == 0 and not manager._exit_layers
        assert all(b.ref_cnt == 0 for b in manager.block_pool.blocks[1:])
        assert llm.reset_prefix_cache()
    assert sum(r.finished for r in requests) > 0.75 * NUM_REQUESTS
    assert wrong_tokens(checkpoint, requests) == []


def test_a_wrong_reuse_gives_wrong_tokens(checkpoint, monkeypatch):
    """Else the test above would say little about reuse."""

    def any_fill(segment, exit_layer):
        return [segment.index, *range(segment.count, segment.count + NUM_LAYERS)]

    monkeypatch.setattr(Segment, "fills_for", any_fill)
    rng = random.Random(9)
    requests = random_requests(rng, 60, NUM_LAYERS)
    with tiny_engine(checkpoint, **CRAMPED) as llm:
        serve(llm.llm_engine, requests, rng)
    assert wrong_tokens(checkpoint, requests)


@pytest.fixture(scope="module")
def roomy(checkpoint):
    with tiny_engine(checkpoint, **BY_DEPTH, disable_log_stats=False) as llm:
        yield llm


def test_mixed_depths_equal_cut_checkpoints(roomy, checkpoint):
    requests = mixed_requests(NUM_LAYERS, ENGINE_SIZES["vocab_size"], first_token=2)
    prompts, depths = [r.prompt for r in requests], [r.exit_layer for r in requests]
    tokens = generate_at(roomy, prompts, depths, max_tokens=12)
    assert mixed_mismatches(checkpoint, depths, prompts, tokens) == []


def cached(llm, prompt, exit_layer, **sampling):
    """Prompt tokens that a request of its own finds in the cache."""
    params = SamplingParams(max_tokens=1, detokenize=False, extra_args=exit_args(exit_layer))
    [output] = llm.generate({"prompt_token_ids": prompt, **sampling}, params, use_tqdm=False)
    return output.num_cached_tokens


def test_deeper_blocks_serve_shallower_requests(roomy):
    rng = random.Random(5)
    prompt = [rng.randrange(5, 512) for _ in range(10 * BLOCK + 3)]
    assert cached(roomy, prompt, 5) == 0
    assert [cached(roomy, prompt, d) for d in (5, 4, 3, 1)] == [10 * BLOCK] * 4
    assert cached(roomy, prompt, 6) == 0
    assert cached(roomy, prompt, 6, cache_salt="tenant") == 0


def test_a_shared_prompt_is_found_as_often_as_at_one_depth(roomy):
    def hit_rate(seed, depths):
        rng = random.Random(seed)
        shared = [rng.randrange(5, 512) for _ in range(960)]
        found = [cached(roomy, [*shared, *rng.choices(range(5, 512), k=40)], d) for d in depths]
        return sum(found) / (1000 * len(depths))

    deep_first = [6, 6, 5, 4, 4, 3, 2, 2, 1, 1]
    single = hit_rate(1, [6] * len(deep_first))
    assert hit_rate(2, deep_first) == pytest.approx(single, rel=0.02) and single > 0.8


def test_memory_follows_depth(roomy):
    """While requests run, `kv_cache_usage` counts the segments they reach."""
    manager = scheduler_of(roomy).kv_cache_manager
    used = {}
    for depth in (2, 4, 6):
        params = SamplingParams(max_tokens=8, detokenize=False, extra_args=exit_args(depth))
        prompt = {"prompt_token_ids": [depth] * (4 * BLOCK + 1)}
        roomy.llm_engine.add_request(str(depth), prompt, params)
        roomy.llm_engine.step()
        used[depth] = round(manager.usage * (manager.block_pool.num_gpu_blocks - 1))
        roomy.llm_engine.abort_request([str(depth)])
        roomy.llm_engine.step()
    assert used == {2: 5, 4: 10, 6: 15}


def test_one_segment_is_vllms_own_cache(checkpoint):
    with tiny_engine(checkpoint, **engine_options(kv_segments=1)) as llm:
        scheduler = scheduler_of(llm)
        assert not scheduler.kv_by_depth
        assert type(scheduler.kv_cache_manager).__module__.startswith("vllm.")
        assert len(scheduler.kv_cache_config.kv_cache_groups) == 1
