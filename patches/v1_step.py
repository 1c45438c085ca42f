"""Seam: see the step a V1 model runner has in flight, and narrow its attention state.

Upstream: `GPUModelRunner.input_batch.req_ids` (batch order), `GPUModelRunner.attn_groups`
(metadata builders and their layers), and in the forward context `attn_metadata` and
`slot_mapping`, both by layer name.
Checked on: vLLM 0.32.0, CPU attention.
Why no extension point serves: the V1 runner builds one attention metadata for all layers and
offers no hook between that and the model's forward.
Retired by: model runner V2, whose `ModelState.prepare_attn` is such a hook.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata

from raee_serve.engine.plan import Stage, TruncationPlan, plan_truncation
from raee_serve_patches.seam import Seam

SEAM = Seam(
    "v1_step",
    {
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": "e058bf791a29",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata": "6015ffa2b3ec",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_slot_mappings": "a7830268c258",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": "7ff5ab962cb4",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata": "f342a75c3ef9",
        "vllm.model_executor.layers.attention.attention:unified_kv_cache_update": "17ae140d6404",
    },
)


class V1Step:
    """The step in flight in one V1 runner; a `StepSource` for the model it runs."""

    def __init__(self, runner: Any, num_layers: int) -> None:
        self._runner = runner
        self._num_layers = num_layers
        self._scheduler_output: Any = None

    @contextmanager
    def running(self, scheduler_output: Any) -> Iterator[None]:
        """Hold `scheduler_output` for the time its step runs. Steps do not nest."""
        assert self._scheduler_output is None, "a step is already in flight"
        self._scheduler_output = scheduler_output
        try:
            yield
        finally:
            self._scheduler_output = None

    def enter_forward(self) -> TruncationPlan | None:
        """Plan the step in flight and put its attention state into the forward context."""
        if self._scheduler_output is None:
            return None
        exit_layers = self._scheduler_output.exit_layers
        query_lens = self._scheduler_output.num_scheduled_tokens
        request_ids = self._runner.input_batch.req_ids
        plan = plan_truncation(
            [exit_layers[r] for r in request_ids],
            [query_lens[r] for r in request_ids],
            self._num_layers,
        )
        if plan is not None and not plan.is_uniform:
            narrow_attention(self._runner.attn_groups, plan)
        return plan


def narrow_attention(attn_groups: list[list[Any]], plan: TruncationPlan) -> None:
    """Give every layer the attention metadata and KV slots of the rows alive at it.

    Built once for each stage and attention group, before the first layer runs. Layers that
    nothing reaches get no entry, so that touching one is an error and not a stray write.
    """
    context = get_forward_context()
    metadata: dict[str, Any] = {}
    slots: dict[str, Any] = {}
    for group in (g for groups in attn_groups for g in groups):
        builder = group.get_metadata_builder()
        whole = _in_plan_order(context.attn_metadata[group.layer_names[0]], plan)
        layers = {name: extract_layer_index(name) for name in group.layer_names}
        for stage in plan.stages:
            names = [n for n, i in layers.items() if stage.first_layer <= i < stage.end_layer]
            if not names:
                continue
            narrowed = _narrow(whole, stage)
            built = builder.build(0, narrowed)
            metadata.update(dict.fromkeys(names, built))
            slots.update(dict.fromkeys(names, narrowed.slot_mapping))
    context.attn_metadata = metadata
    context.slot_mapping = slots


def _in_plan_order(built: Any, plan: TruncationPlan) -> CommonAttentionMetadata:
    """The whole step's common metadata, taken back from one group's built metadata."""
    seq_lens, block_table, slots = built.seq_lens, built.block_table, built.slot_mapping
    if plan.request_order is not None:
        seq_lens = seq_lens[plan.request_order]
        block_table = block_table[plan.request_order]
        slots = slots[plan.row_order]
    return CommonAttentionMetadata(
        query_start_loc=plan.query_start_loc,
        query_start_loc_cpu=plan.query_start_loc,
        seq_lens=seq_lens,
        num_reqs=len(seq_lens),
        num_actual_tokens=plan.num_rows,
        max_query_len=built.max_query_len,
        max_seq_len=built.max_seq_len,
        block_table_tensor=block_table,
        slot_mapping=slots,
        causal=built.causal,
    )


def _narrow(whole: CommonAttentionMetadata, stage: Stage) -> CommonAttentionMetadata:
    """The part of the step that is alive in `stage`: views of the first requests and rows."""
    requests, rows = stage.num_requests, stage.num_rows
    query_start_loc = whole.query_start_loc[: requests + 1]
    return CommonAttentionMetadata(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=whole.seq_lens[:requests],
        num_reqs=requests,
        num_actual_tokens=rows,
        max_query_len=stage.max_query_len,
        max_seq_len=whole.max_seq_len,
        block_table_tensor=whole.block_table_tensor[:requests],
        slot_mapping=whole.slot_mapping[:rows],
        causal=whole.causal,
    )
