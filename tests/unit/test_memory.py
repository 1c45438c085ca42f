"""How much memory the KV cache gets on a CPU."""

import re

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from raee_serve.errors import RaeeError
from raee_serve.server.memory import (
    BLOCK_TOKENS,
    GIB,
    WORKER_BYTES,
    Memory,
    kv_cache_bytes,
    longest_request_bytes,
)

pytestmark = pytest.mark.unit

LAPTOP = Memory(total=24 * GIB, available=20 * GIB, weights=GIB, longest=GIB // 4)
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 256}
TOKEN_BYTES = 2 * 32 * 2 * 4
"""Keys and values of one token in one layer of HEADS, as float32."""


def changed(**changes):
    return Memory(**{name: changes.get(name, getattr(LAPTOP, name)) for name in Memory.__slots__})


@pytest.mark.parametrize(
    "short",
    [
        {"available": 3 * GIB},  # the weights and the processes take all of it
        {"available": GIB},
        {"weights": 18 * GIB},
        {"longest": 18 * GIB},
        {"engines": 8},
        {"workers": 10},
    ],
)
def test_without_room_for_one_request_the_numbers_are_named(short):
    memory = changed(**short)
    with pytest.raises(RaeeError, match=r"--max-model-len.*--kv-cache-memory-bytes") as caught:
        kv_cache_bytes(memory)
    named = [float(number) for number in re.findall(r"\d+\.\d", str(caught.value))]
    processes = memory.workers * WORKER_BYTES
    sizes = [memory.total, memory.available, memory.weights, processes, memory.longest]
    assert named == pytest.approx([size / GIB for size in sizes], abs=0.06)


def test_a_quarter_of_the_machine_where_that_is_free():
    assert kv_cache_bytes(LAPTOP) == 6 * GIB


def test_half_of_what_would_be_left_where_that_is_less():
    assert kv_cache_bytes(changed(available=9 * GIB)) == (9 * GIB - GIB - WORKER_BYTES) // 2


def test_more_where_one_request_needs_it():
    assert kv_cache_bytes(changed(longest=8 * GIB)) == 8 * GIB
    fits = changed(available=GIB + WORKER_BYTES + GIB // 4)
    assert kv_cache_bytes(fits) == GIB // 4


def test_engines_share_the_machine_and_workers_their_engine():
    assert kv_cache_bytes(changed(engines=2)) == 3 * GIB
    assert kv_cache_bytes(changed(workers=2)) == 3 * GIB


def test_no_length_needs_no_room():
    """As with --max-model-len auto, where vLLM takes what fits."""
    assert kv_cache_bytes(changed(available=5 * GIB, longest=0)) == GIB


def tokens(num_tokens, config, item_bytes=4, **step):
    """What a request of so many takes, in tokens of one layer of HEADS."""
    size = longest_request_bytes(config, num_tokens, item_bytes, **step)
    assert size % (TOKEN_BYTES // 4 * item_bytes) == 0
    return size // (TOKEN_BYTES // 4 * item_bytes)


EMPTY = BLOCK_TOKENS
"""Of each layer one block, which vLLM gives to no request."""


@pytest.mark.parametrize("item_bytes", [2, 4])
def test_every_layer_of_full_attention_holds_all_tokens(item_bytes):
    config = LlamaConfig(num_hidden_layers=3, **HEADS)
    assert tokens(1024, config, item_bytes) == 3 * (1024 + EMPTY)
    assert tokens(0, config, item_bytes) == 3 * EMPTY


def test_a_block_is_held_as_a_whole():
    config = LlamaConfig(num_hidden_layers=3, **HEADS)
    assert tokens(1, config) == tokens(BLOCK_TOKENS, config) == 3 * (BLOCK_TOKENS + EMPTY)


@pytest.mark.parametrize(("length", "window"), [(4096, 256), (4096, 512), (600, 512), (100, 512)])
def test_a_sliding_layer_holds_what_vllm_wants_room_for(length, window):
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        num_hidden_layers=2, layer_types=kinds, sliding_window=window, **HEADS, head_dim=32
    )
    own = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.float32, "block_size": BLOCK_TOKENS}
    spec = SlidingWindowSpec(sliding_window=window, **own)
    sliding = spec.max_admission_blocks_per_request(300, length) * BLOCK_TOKENS
    whole = -(-length // BLOCK_TOKENS) * BLOCK_TOKENS
    assert tokens(length, config, step_tokens=300) == sliding + whole + 2 * EMPTY


def test_layers_may_all_slide():
    config = MistralConfig(num_hidden_layers=3, sliding_window=512, **HEADS)
    assert tokens(4096, config, step_tokens=1) == 3 * (512 + BLOCK_TOKENS + EMPTY)


def test_the_size_of_a_head_is_its_own():
    config = LlamaConfig(num_hidden_layers=1, **HEADS, head_dim=64)
    assert tokens(128, config) == 2 * (128 + EMPTY)
