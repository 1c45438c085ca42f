"""Seam: give the scheduler a KV cache manager that knows each request's exit layer.

Upstream: `Scheduler.kv_cache_manager`; `KVCacheManager.get_computed_blocks`, `allocate_slots`,
`free`, `estimate_cached_tokens`, `kv_cache_event_metadata`; below them what
`raee_serve.engine.kv_cache.SegmentManager` overrides, and the grouping of layers by spec.
Checked on: vLLM 0.32.0.
Why no extension point serves: a manager of one KV cache group can be registered, but prefix
look-up hands it hashes and no request, allocation a request id, and all groups must hit alike.
Retired by: a way to name the scheduler's `KVCacheManager`, and single-type managers that are
given the request.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.request import Request, RequestStatus

from raee_serve.engine.kv_cache import SegmentManager, register_segments
from raee_serve_patches.seam import Seam

logger = init_logger(f"vllm.{__name__}")

_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_COORDINATOR = "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator"
_HYBRID = "vllm.v1.core.kv_cache_coordinator:HybridKVCacheCoordinator"
_SINGLE = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_UTILS = "vllm.v1.core.kv_cache_utils"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

SEAM = Seam(
    "depth_kv_cache",
    {
        f"{_MANAGER}.__init__": "f08acce5c05c",
        f"{_MANAGER}.get_computed_blocks": "77f434d88d57",
        f"{_MANAGER}.allocate_slots": "8c60d937fd9e",
        f"{_MANAGER}.free": "6ee26cbc5b6f",
        f"{_MANAGER}.take_events": "27516960ab25",
        f"{_MANAGER}.estimate_cached_tokens": "cf9f147015bc",
        f"{_COORDINATOR}.get_num_blocks_to_allocate": "4500949e3f03",
        f"{_COORDINATOR}.allocate_new_computed_blocks": "c98f7d4f3ae5",
        f"{_COORDINATOR}.allocate_new_blocks": "2ceddac00360",
        f"{_COORDINATOR}.cache_blocks": "8a801b2adf06",
        f"{_HYBRID}.get_num_cacheable_tokens": "4b00f5b368d9",
        f"{_SINGLE}.get_num_blocks_to_allocate": "f50d7c5b5451",
        f"{_SINGLE}.add_local_computed_blocks": "8c415d4822aa",
        f"{_SINGLE}.allocate_new_blocks": "b8edfbf2e166",
        f"{_SINGLE}.cache_blocks": "973ea9fec074",
        f"{_SINGLE}.pop_blocks_for_free": "bc0da22a739b",
        f"{_POOL}.get_cached_block": "900b7434e95c",
        f"{_POOL}.cache_full_blocks": "5fbbcc0cf6eb",
        f"{_POOL}.free_blocks": "f12f94bc787c",
        f"{_UTILS}:get_kv_cache_groups": "8dda9428a81d",
        f"{_UTILS}:is_kv_cache_spec_uniform": "ca9c08d62d84",
        f"{_UTILS}:_get_kv_cache_groups_uniform_page_size": "79a07fdd7261",
        f"{_SCHEDULER}.__init__": "c02680245672",
        f"{_SCHEDULER}._free_request_blocks": "f967ef091154",
    },
)


class DepthKVCacheManager(KVCacheManager):
    """vLLM's, with blocks only in the segments that a request's exit layer reaches.

    exit_layer_of: exit layer of a request, 1..num_layers, the same whenever it is asked.
    """

    def __init__(self, exit_layer_of: Callable[[Request], int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._exit_layer_of = exit_layer_of
        self._exit_layers: dict[str, int] = {}
        self.segments: tuple[SegmentManager, ...] = self.coordinator.single_type_managers
        for manager in self.segments:
            manager.exit_layers = self._exit_layers
        # Events name a block's fill as its group, and vLLM looks that up here.
        num_fills = len(self.segments) + self.segments[-1].segment.end_layer
        self.kv_cache_event_metadata = self.kv_cache_event_metadata[:1] * num_fills

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """The longest prefix that is cached in every segment the request reaches."""
        if not self.prefix_cache_lookup_enabled(request):
            return self.empty_kv_cache_blocks, 0, 0
        exit_layer = self._exit_layer_of(request)
        reached = [m for m in self.segments if m.segment.is_reached(exit_layer)]
        fills = [m.segment.fills_for(exit_layer) for m in reached]
        block_size = reached[0].block_size
        hashes = resolve_block_hashes(
            request.block_hashes, self.block_pool.hash_block_size, block_size
        )
        found: tuple[list[KVCacheBlock], ...] = tuple([] for _ in self.segments)
        # The last token is computed in any case, for its logits.
        for block_hash in islice(hashes, (request.num_tokens - 1) // block_size):
            row = [m.cached_block(block_hash, f) for m, f in zip(reached, fills, strict=True)]
            if None in row:
                break
            for blocks, block in zip(found, row, strict=False):
                blocks.append(block)
        self._report_reuse(request, exit_layer, found)
        return self.create_kv_cache_blocks(found), len(found[0]) * block_size, 0

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        if self._has_slots(request, num_new_tokens + kwargs.get("num_lookahead_tokens", 0)):
            return self.empty_kv_cache_blocks
        self._exit_layers[request.request_id] = self._exit_layer_of(request)
        return super().allocate_slots(request, num_new_tokens, *args, **kwargs)

    def _has_slots(self, request: Request, num_new_tokens: int) -> bool:
        """Whether a running request needs no block for its next tokens, nor fills one to keep.

        So it is in most decode steps, and asking every segment would cost far more than the
        answer: they all hold equally many.
        """
        first, request_id = self.segments[0], request.request_id
        if request.status != RequestStatus.RUNNING:
            return False
        end = min(request.num_computed_tokens + num_new_tokens, self.max_model_len)
        if end > len(first.req_to_blocks.get(request_id, ())) * first.block_size:
            return False
        num_full = min(end, request.num_tokens) // first.block_size
        return not self.enable_caching or num_full <= first.num_cached_block.get(request_id, 0)

    def free(self, request: Request) -> None:
        """As vLLM's, but the blocks evicted first are the last in the prompt, of all segments.

        Group by group, all of the first segment would go before anything of the others, which
        are of no use without it. At one place the deepest goes first: it serves the fewest.
        """
        self._exit_layers.pop(request.request_id, None)
        held = [m.pop_blocks_for_free(request.request_id) for m in reversed(self.segments)]
        places = list(zip(*held, strict=True))
        self.block_pool.free_blocks(b for place in reversed(places) for b in place if not b.is_null)

    def estimate_cached_tokens(self, request: Request) -> int:
        """Tokens cached by the request; the first segment, which all reach, tells for all."""
        blocks = self.segments[0].req_to_blocks.get(request.request_id, ())
        return max((block.block_hash_num_tokens or 0 for block in blocks), default=0)

    def _report_reuse(
        self, request: Request, exit_layer: int, found: tuple[list[KVCacheBlock], ...]
    ) -> None:
        """Events for reused blocks, of requests that want them, in segments they fill."""
        if not (self.enable_kv_cache_events and found[0]):
            return
        if getattr(request, "kv_cache_report_mode", "incremental") == "full":
            whole = tuple(
                blocks if m.segment.end_layer <= exit_layer else []
                for blocks, m in zip(found, self.segments, strict=True)
            )
            self.coordinator.emit_cached_block_events(request, whole)


def bring_kv_cache_manager(scheduler: Any, exit_layer_of: Callable[[Request], int]) -> None:
    """Put a `DepthKVCacheManager` in the place of the scheduler's own, before its first request."""
    SEAM.check()
    register_segments()
    scheduler.kv_cache_manager = DepthKVCacheManager(
        exit_layer_of,
        kv_cache_config=scheduler.kv_cache_config,
        max_model_len=scheduler.max_model_len,
        scheduler_block_size=scheduler.block_size,
        hash_block_size=scheduler.hash_block_size,
        max_in_flight_tokens=scheduler.vllm_config.max_in_flight_tokens,
        enable_caching=scheduler.cache_config.enable_prefix_caching,
        log_stats=scheduler.log_stats,
        enable_kv_cache_events=scheduler.enable_kv_cache_events,
        dcp_world_size=scheduler.dcp_world_size,
        metrics_collector=scheduler.kv_metrics_collector,
        watermark=scheduler.scheduler_config.watermark,
    )
    _log_capacity(scheduler.kv_cache_manager)


def _log_capacity(manager: DepthKVCacheManager) -> None:
    """vLLM's own line at start-up is about requests at full depth."""
    first, count = manager.segments[0], len(manager.segments)
    longest = cdiv(manager.max_model_len, first.block_size)
    logger.info(
        "KV cache by depth: %d segments of %d layers; requests of %d tokens that fit at once: "
        "%.1f at full depth, %.1f at exit layers up to %d",
        count,
        first.segment.end_layer,
        manager.max_model_len,
        manager.block_pool.num_gpu_blocks / (longest * count),
        manager.block_pool.num_gpu_blocks / longest,
        first.segment.end_layer,
    )
