"""Where the KV cache is vLLM's own, events name blocks by hashes that depths do not share."""

import random

import pytest
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockStored

from raee_serve.engine.settings import engine_options
from tests.engine.engines import generate_at, tiny_engine
from tests.tiny import ENGINE_SIZES, saved, tiny_llama

pytestmark = pytest.mark.engine

NUM_LAYERS, BLOCK = 6, 128


def test_each_depth_stores_blocks_of_its_own(tmp_path, monkeypatch):
    checkpoint = saved(tiny_llama(NUM_LAYERS, **ENGINE_SIZES), tmp_path / "llama")
    rng = random.Random(1)
    prompt = [rng.randrange(5, ENGINE_SIZES["vocab_size"]) for _ in range(2 * BLOCK + 10)]
    events_on = KVEventsConfig(enable_kv_cache_events=True, publisher="null")

    stored = {}
    with tiny_engine(checkpoint, kv_events_config=events_on, **engine_options(1)) as llm:
        for depth in (2, 4, 2, NUM_LAYERS):
            found, _ = stored_blocks(llm, monkeypatch, prompt, depth)
            stored.setdefault(depth, []).append(found)

    assert [len(found) for found in stored[2]] == [2, 0]  # the second finds the first's blocks
    assert len(stored[4][0]) == len(stored[NUM_LAYERS][0]) == 2
    assert len(set().union(*(found for times in stored.values() for found in times))) == 6


def stored_blocks(llm, monkeypatch, prompt, depth, head="plain"):
    """(hashes of the blocks that a request at this exit stores, its one token)"""
    publisher = llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher
    batches = []
    monkeypatch.setattr(publisher, "publish", batches.append)
    [tokens] = generate_at(llm, [prompt], [depth], [head], max_tokens=1)
    events = [event for batch in batches for event in batch.events]
    return {h for e in events if isinstance(e, BlockStored) for h in e.block_hashes}, tokens
