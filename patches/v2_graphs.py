"""Seam: capture segments of a model's layers as CUDA graphs beside vLLM's own.

Upstream: `AttentionGroup.build_metadata` and `build_metadata_for_cudagraph_capture`,
`set_forward_context`, `BlockTables.get_dummy_block_tables`; `graph_capture`, `capture_pool` and the
global graph pool; `CustomOp.dispatch_forward` and `IrOpPriorityConfig`.
Checked on: vLLM 0.32.0.
Why no extension point serves: `ModelState.capture_inner_cudagraphs` says when to capture, and
`CudaGraphManager` captures one function of the whole batch; a function of some layers, at a size of
its own, has to bring metadata and memory itself.
Retired by: a graph manager that takes any function, and layers that are compiled one by one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import set_current_vllm_config
from vllm.config.kernel import IrOpPriorityConfig
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata

from raee_serve.engine.graph_segments import StaticRows
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
        "vllm.model_executor.custom_op:CustomOp.dispatch_forward": "191239144c3e",
        "vllm.config.kernel:IrOpPriorityConfig": "7f75c322f8b5",
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
            [(g, names) for g in groups if (names := _within(g.layer_names, first, end))]
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


def use_platform_kernels(vllm_config: Any, layers: nn.Module) -> None:
    """Let `layers` run the platform's own kernels from now on. Safe to call again.

    Where vLLM compiles the stack, its operators are left to the compiler, and outside of compiled
    code would run as one small kernel after the other. Only after that was compiled: it then stays
    what it is, for vLLM traces it once.
    """
    with set_current_vllm_config(vllm_config):
        for operator in layers.modules():
            if isinstance(operator, CustomOp):
                operator._enforce_enable = True
                operator._forward_method = operator.dispatch_forward(compile_native=False)
    if current_platform.is_cuda():
        IrOpPriorityConfig.with_default(["vllm_c", "native"]).set_default()


def _within(names: Sequence[str], first: int, end: int) -> list[str]:
    """Those of layers `first .. end - 1`."""
    return [name for name in names if first <= extract_layer_index(name) < end]
