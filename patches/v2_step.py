"""Seam: narrow the attention state of a step that a V2 model runner has in flight.

Upstream: what `ModelState.prepare_attn` is given (`InputBatch`, block tables and slot mappings by
KV cache group, `AttentionGroup.build_metadata`); in the forward context `attn_metadata` and
`slot_mapping`, both by layer name; `GPUModelRunner.cudagraph_manager`. That after a step the first
logits the runner asks for are those it samples from, one row a request and one for each draft.
Checked on: vLLM 0.32.0.
Why no extension point serves: `prepare_attn` may return metadata for each layer, but the runner
has made the slot mapping by then, and some backends keep metadata in buffers of their own, which
the next stage's would overwrite before the first one ran. And the runner picks a CUDA graph of all
layers before it asks the model state anything.
Retired by: a `ModelState` hook before the graph is picked, and slot mappings from `prepare_attn`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from raee_serve.engine.plan import Stage, TruncationPlan
from raee_serve.engine.scheduler import Exits
from raee_serve_patches.layer_names import names_within
from raee_serve_patches.seam import Seam

_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_ATTENTION = "vllm.v1.worker.gpu.attn_utils"

SEAM = Seam(
    "v2_step",
    {
        f"{_RUNNER}.execute_model": "e1535583ba75",
        f"{_RUNNER}.add_requests": "8321187d017e",
        f"{_RUNNER}.finish_requests": "d78030bf2a44",
        f"{_RUNNER}.prepare_inputs": "bdd97f12ca57",
        f"{_RUNNER}.prepare_attn": "da2162a643e4",
        f"{_RUNNER}.sample": "78982d0f9f60",
        f"{_RUNNER}.sample_tokens": "de7f3c7b008b",
        f"{_RUNNER}.capture_model": "bad5e0346103",
        f"{_ATTENTION}:build_attn_metadata": "b7faabe5c799",
        f"{_ATTENTION}:build_slot_mappings_by_layer": "ff47499588f2",
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState": "6bce85b0b3d2",
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.dispatch": "16099f992970",
        "vllm.v1.worker.gpu.dp_utils:dispatch_cg_and_sync_dp": "7b73eb8cd9b2",
        "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.add_request": "e587f060bdb1",
        "vllm.v1.worker.utils:AttentionGroup": "a225b65d3349",
        "vllm.model_executor.layers.attention.attention:unified_kv_cache_update": "17ae140d6404",
    },
)


class V2Step:
    """The steps of one V2 runner. Its model state plans them; here they get to the model.

    source: what the model asks for the plan of its forward.
    """

    def __init__(
        self, runner: Any, decoder: nn.Module, exits: Exits, points: tuple[int, ...]
    ) -> None:
        """See `TruncatingModelState.follow`. Raises `RuntimeError` for another's state."""
        self._runner = runner
        self._num_layers = exits.num_layers
        self.source = runner.model_state
        if not hasattr(self.source, "follow"):
            raise RuntimeError(
                f"raee-serve: {type(runner.get_model()).__name__} runs with vLLM's "
                f"{type(self.source).__name__}. Model runner V2 runs text models truncated, "
                "not those within a multimodal one"
            )
        self.source.follow(decoder, exits, points)

    @contextmanager
    def running(self, scheduler_output: Any) -> Iterator[None]:
        """While open, the runner calls the model where a step is truncated.

        Else it would replay a graph of all layers, had it one of the step's size: the manager's
        flag says that there is none. With data parallelism the ranks agree on that.
        """
        manager = self._runner.cudagraph_manager
        # vLLM warms its kernels up with steps that no scheduler has planned, of full depth.
        exit_layers = getattr(scheduler_output, "exit_layers", {})
        is_truncated = any(d < self._num_layers for d in exit_layers.values())
        if manager is None or not (is_truncated and manager._graphs_captured):
            yield
            return
        manager._graphs_captured = False
        try:
            yield
        finally:
            manager._graphs_captured = True


class StageAttention:
    """One step's attention state in plan order, put into the forward context stage by stage."""

    def __init__(
        self,
        plan: TruncationPlan,
        input_batch: Any,
        block_tables: Sequence[torch.Tensor],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[Any]],
    ) -> None:
        """plan: with its indices where the batch is.

        block_tables: for each KV cache group [R or more, blocks]; slot_mappings: [groups, T].
        """
        num_requests = input_batch.num_reqs
        order, device = plan.request_order, input_batch.seq_lens.device
        self._device = device
        self._seq_lens = _ordered(input_batch.seq_lens[:num_requests], order)
        self._block_tables = [_ordered(table[:num_requests], order) for table in block_tables]
        self._slots = slot_mappings[:, : plan.num_rows]
        if plan.row_order is not None:
            self._slots = self._slots[:, plan.row_order]
        # Longer than a request of few layers needs; exact lengths are known to the device alone.
        self._max_seq_len = int(input_batch.seq_lens_cpu_upper_bound[:num_requests].max())
        self._groups = [group for groups in attn_groups for group in groups]

    def enter(self, stage: Stage) -> None:
        """Give the stage's layers the metadata and KV slots of the rows alive in it.

        No other layer has any, so that touching one is an error and not a stray write. Called
        when the stages before are on their way to the device, so that what a backend keeps in
        one buffer for all of them is overwritten in turn.
        """
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        starts = async_tensor_h2d(stage.query_start_loc, device=self._device)
        for group in self._groups:
            if names := names_within(group.layer_names, stage.first_layer, stage.end_layer):
                common = self._at(stage, group.kv_cache_group_id, starts)
                metadata.update(dict.fromkeys(names, group.build_metadata(common, 0)))
                slots.update(dict.fromkeys(names, common.slot_mapping))
        context = get_forward_context()
        context.attn_metadata, context.slot_mapping = metadata, slots

    def _at(self, stage: Stage, group: int, starts: torch.Tensor) -> CommonAttentionMetadata:
        requests = stage.num_requests
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=stage.query_start_loc,
            seq_lens=self._seq_lens[:requests],
            num_reqs=requests,
            num_actual_tokens=stage.num_kept,
            max_query_len=stage.max_query_len,
            max_seq_len=self._max_seq_len,
            block_table_tensor=self._block_tables[group][:requests],
            slot_mapping=self._slots[group, : stage.num_rows],
        )


def _ordered(values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return values if order is None else values[order]
