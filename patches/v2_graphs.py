"""Seam: capture segments of a model's layers as CUDA graphs beside vLLM's own.

Upstream: `AttentionGroup.build_metadata` and `build_metadata_for_cudagraph_capture`,
`set_forward_context`, `BlockTables.get_dummy_block_tables`; `graph_capture`, `capture_pool` and the
global graph pool.
Checked on: vLLM 0.32.0.
Why no extension point serves: `ModelState.capture_inner_cudagraphs` says when to capture, and
`CudaGraphManager` captures one function of the whole batch; a function of some layers, at a size of
its own, has to bring metadata and memory itself.
Retired by: a graph manager that takes any function.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata

from raee_serve.engine.graph_segments import StaticRows
from raee_serve_patches.layer_names import names_within
from raee_serve_patches.seam import Seam

SEAM = Seam(
    "v2_graphs",
    {
        "vllm.v1.worker.utils:AttentionGroup": "a225b65d3349",
        "vllm.v1.worker.gpu.block_table:BlockTables.get_dummy_block_tables": "f258720e1ad3",
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture": "69c4d2047db3",
        "vllm.v1.worker.gpu.cudagraph_utils:prepare_inputs_to_capture": "8879251c161a",
        "vllm.v1.worker.gpu.cudagraph_utils:profile_cudagraph_memory": "ffdd4cd7ba6c",
        "vllm.compilation.cudagraph_pool:capture_pool": "0b9fdf1b348f",
        "vllm.distributed.parallel_state:graph_capture": "14110c29e34d",
    },
)


class GraphAttention:
    """Attention metadata of segments on static rows; a `SegmentAttention`."""

    def __init__(
        self,
        vllm_config: Any,
        rows: StaticRows,
        segments: Sequence[tuple[int, int]],
        attn_groups: list[list[Any]],
    ) -> None:
        self._vllm_config = vllm_config
        self._rows = rows
        groups = [group for groups in attn_groups for group in groups]
        self._groups = [
            [(g, names) for g in groups if (names := names_within(g.layer_names, first, end))]
            for first, end in segments
        ]

    @contextmanager
    def open(self, segment: int, size: int, alive: int, max_seq_len: int | None) -> Iterator[None]:
        """See `SegmentAttention.open`."""
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for group, names in self._groups[segment]:
            common = self._common(segment, size, alive, max_seq_len, group.kv_cache_group_id)
            if max_seq_len is None:
                built = group.build_metadata_for_cudagraph_capture(common, 0)
            else:
                built = group.build_metadata(common, 0)
            metadata.update(dict.fromkeys(names, built))
            slots.update(dict.fromkeys(names, common.slot_mapping))
        with set_forward_context(metadata, self._vllm_config, num_tokens=size, slot_mapping=slots):
            yield

    def _common(
        self, segment: int, size: int, alive: int, max_seq_len: int | None, kv_cache_group: int
    ) -> CommonAttentionMetadata:
        rows = self._rows
        return CommonAttentionMetadata(
            query_start_loc=rows.starts[segment, : size + 1],
            query_start_loc_cpu=torch.arange(size + 1, dtype=torch.int32).clamp(max=alive),
            seq_lens=rows.seq_lens[segment, :size],
            num_reqs=size,
            num_actual_tokens=size,
            max_query_len=1,
            max_seq_len=max_seq_len or self._vllm_config.model_config.max_model_len,
            block_table_tensor=rows.block_tables[kv_cache_group][:size],
            slot_mapping=rows.slots[segment, kv_cache_group, :size],
        )


class CudaGraphs:
    """Captures functions as CUDA graphs in the pool that vLLM's share."""

    def __init__(self, vllm_config: Any) -> None:
        self._vllm_config = vllm_config

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        function()  # what is made or tuned at first use is not to be in the graph
        graph = torch.cuda.CUDAGraph()
        pool = current_platform.get_global_graph_pool()
        with (
            capture_pool(pool, self._vllm_config) as pool,
            torch.cuda.graph(graph, pool, stream=torch.cuda.current_stream()),
        ):
            function()
        return graph.replay


@contextmanager
def capturing(device: torch.device) -> Iterator[None]:
    """Around the captures; collectives take part in them."""
    with graph_capture(device):
        yield
