"""How large a CPU engine's KV cache is where the user does not say.

vLLM would take 92% of the memory, and start only if all of that is free. On a laptop it is not, the
less so with an exit table and an encoder loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raee_serve.errors import RaeeError

GIB = 1 << 30
WORKER_BYTES = 2 * GIB
"""Of a worker and its share of the engine core, without weights and KV cache: libraries, and the
activations and logits of a step."""
BLOCK_TOKENS = 128
"""Of a KV block, as vLLM has them on CPUs."""
STEP_TOKENS = 2048
"""Of a step, at most, for each worker: what vLLM's servers take on CPUs."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a machine on which all is loaded but its engines; bytes.

    available: of `total`, what is free. weights: of the model, as it is served.
    longest: KV cache of one request of the model's full length, at full depth.
    engines: that each hold the model. workers: processes that share an engine's.
    """

    total: int
    available: int
    weights: int
    longest: int
    engines: int = 1
    workers: int = 1


def kv_cache_bytes(memory: Memory) -> int:
    """For each worker: half of what would be left, up to a quarter of the machine's memory.

    It is more where one request of the model's full length takes more, for vLLM does not start
    without room for that. Raises RaeeError where there is none.
    """
    needed = memory.weights + memory.workers * WORKER_BYTES
    left = memory.available // memory.engines - needed
    if left < memory.longest:
        raise RaeeError(
            f"no memory for a KV cache: of {_gib(memory.total)} GiB {_gib(memory.available)} are "
            f"free; each of {memory.engines} engines needs {_gib(memory.weights)} for weights, "
            f"{_gib(needed - memory.weights)} for its processes and {_gib(memory.longest)} for one "
            "request of the model's full length. Free some, lower --max-model-len, or say what "
            "the KV cache is to take by --kv-cache-memory-bytes"
        )
    usual = min(left // 2, memory.total // (4 * memory.engines))
    return max(usual, memory.longest) // memory.workers


def longest_request_bytes(
    config: Any, num_tokens: int, item_bytes: int, step_tokens: int = STEP_TOKENS
) -> int:
    """KV cache of one request of `num_tokens`, keys and values of `item_bytes` each.

    config: of the text model, by Transformers. step_tokens: most of one step. A layer with a
    sliding window holds no more than that and a step's tokens, and may hold a part of one block
    more (`SlidingWindowSpec.max_admission_blocks_per_request`). The block of each layer that vLLM
    keeps empty is counted in.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    window = getattr(config, "sliding_window", None) or 0
    sliding = _blocks(min(window - 1 + step_tokens, num_tokens)) + 1
    every = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [every] * config.num_hidden_layers
    held = [sliding if kind == "sliding_attention" else _blocks(num_tokens) for kind in kinds]
    blocks = sum(held) + len(held)
    return blocks * BLOCK_TOKENS * heads * head_size * 2 * item_bytes


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
