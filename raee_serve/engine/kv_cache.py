"""KV cache groups by depth: vLLM's spec of one segment's layers, and the manager of its blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from raee_serve.engine.compat import UnsupportedError
from raee_serve.engine.segments import AUTO, Segment, default_count, segments_of

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True, kw_only=True)
class SegmentSpec(FullAttentionSpec):
    """Full attention in one segment. vLLM puts layers into one group that have equal specs."""

    segment: Segment

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The one spec that all are. Raises `AssertionError`, as vLLM expects, if they differ."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of different segments do not share a KV cache group")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class SegmentManager(FullAttentionManager):
    """Blocks of one segment, for the requests that reach it.

    exit_layers: exit layer by request id, shared by all segments and kept by whoever knows the
        requests; to be set before the first of them is allocated for.

    A request that does not reach the segment has vLLM's null block in every place: it costs
    nothing, and no slot of another request can stand in its row of the block table.
    """

    exit_layers: Mapping[str, int]

    @property
    def segment(self) -> Segment:
        return self.kv_cache_spec.segment

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        if not self.segment.is_reached(self.exit_layers[request_id]):
            return 0
        return super().get_num_blocks_to_allocate(request_id, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if self.segment.is_reached(self.exit_layers[request_id]):
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        blocks = self.req_to_blocks[request_id]
        absent = [self._null_block] * (cdiv(num_tokens, self.block_size) - len(blocks))
        blocks.extend(absent)
        return absent

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Keep the request's full blocks for reuse, under what it fills of them."""
        request_id = request.request_id
        exit_layer = self.exit_layers[request_id]
        if not self.segment.is_reached(exit_layer):
            return
        num_cached = self.num_cached_block.get(request_id, 0)
        num_full = num_tokens // self.block_size
        if num_full <= num_cached:
            return
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=self.req_to_blocks[request_id],
            num_cached_blocks=num_cached,
            num_full_blocks=num_full,
            block_size=self.block_size,
            kv_cache_group_id=self.segment.fill(exit_layer),
        )
        self.num_cached_block[request_id] = num_full

    def cached_block(self, block_hash: BlockHash, fills: Sequence[int]) -> KVCacheBlock | None:
        """A block kept under this hash and the first of `fills` that there is one for."""
        for fill in fills:
            if found := self.block_pool.get_cached_block(block_hash, [fill]):
                return found[0]
        return None


def split_by_depth(
    specs: dict[str, KVCacheSpec], num_layers: int, asked: int | Literal["auto"]
) -> dict[str, KVCacheSpec]:
    """`specs`, by layer name, each with its segment; as they were when `asked` is 1.

    A model that cannot be split keeps vLLM's cache when `asked` is "auto", and says so; a number
    raises `UnsupportedError`.
    """
    if asked == 1:
        return specs
    count = default_count(num_layers) if asked == AUTO else asked
    if problem := _problem(specs, num_layers, count):
        if asked != AUTO:
            raise UnsupportedError(f"raee-serve cannot run with {asked} KV segments: {problem}")
        logger.info("The KV cache does not grow with depth: %s", problem)
        return specs
    segments = segments_of(num_layers, count)
    size = num_layers // count
    return {
        name: _with_segment(spec, segments[extract_layer_index(name) // size])
        for name, spec in specs.items()
    }


def _problem(specs: dict[str, KVCacheSpec], num_layers: int, count: int) -> str | None:
    """Why these layers cannot be in `count` segments, if they cannot."""
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
            return f"{name} has {type(spec).__name__}; allowed: full attention in every layer"
    if len(specs) != num_layers:
        return f"{len(specs)} of {num_layers} layers have a KV cache; allowed: all of them"
    if count == 1:
        return f"no number of segments from 2 to 8 divides {num_layers} layers evenly"
    try:
        segments_of(num_layers, count)
    except ValueError as error:
        return str(error)
    return None


def _with_segment(spec: FullAttentionSpec, segment: Segment) -> SegmentSpec:
    values = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
    return SegmentSpec(**values, segment=segment)


def is_split(kv_cache_config: KVCacheConfig) -> bool:
    """Whether the cache that vLLM laid out is one of segments."""
    return any(isinstance(g.kv_cache_spec, SegmentSpec) for g in kv_cache_config.kv_cache_groups)


def register_segments() -> None:
    """Tell vLLM which manager a `SegmentSpec` has. Safe to call again."""
    # The first look at the registry fills in vLLM's own; an entry made before would keep them out.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(SegmentSpec, SegmentManager)
