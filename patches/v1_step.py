"""Seam: see the step a V1 model runner has in flight, and narrow its attention state.

Upstream: `GPUModelRunner.input_batch.req_ids` (batch order, which is that of the rows that
`compute_logits` is given in `execute_model`), `requests` and their `sampling_params`,
`num_prompt_logprobs` (requests whose prompt is being scored), `attn_groups` (metadata builders and
their layers), and in the forward context `attn_metadata` and `slot_mapping`, both by layer name.
Checked on: vLLM 0.32.0, CPU attention.
Why no extension point serves: the V1 runner builds one attention metadata for all layers and
offers no hook between that and the model's forward.
Retired by: model runner V2, whose `ModelState.prepare_attn` is such a hook.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID as NO_SLOT

from raee_serve.engine.layer_loop import fitted
from raee_serve.engine.plan import Stage, TruncationPlan, plan_truncation
from raee_serve.engine.probe_head import AskedProbe, ProbeRows, asked_probe
from raee_serve.engine.row_widths import exact, recurring
from raee_serve_patches.allowed_tokens import allowed_tokens
from raee_serve_patches.layer_names import names_within
from raee_serve_patches.lora_rows import LoraRows
from raee_serve_patches.sampler_columns import SamplerColumns
from raee_serve_patches.seam import Seam

SEAM = Seam(
    "v1_step",
    {
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": "e058bf791a29",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata": "6015ffa2b3ec",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict": "889fdb068dfc",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._calc_spec_decode_metadata": "6148d63fa0bf",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_slot_mappings": "a7830268c258",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": "7ff5ab962cb4",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata": "f342a75c3ef9",
        "vllm.model_executor.layers.attention.attention:unified_kv_cache_update": "17ae140d6404",
    },
)


class V1Step:
    """The step in flight in one V1 runner; a `StepSource` for the model it runs.

    source: itself, as what the model asks for the plan of its forward.
    deepest_exit: of its requests; the number of layers when no step is in flight.
    """

    def __init__(self, runner: Any, num_layers: int) -> None:
        self._runner = runner
        self._num_layers = self.deepest_exit = num_layers
        self._lora = LoraRows(runner) if runner.lora_config else None
        # Adapters are mapped to the rows there are; only a CPU makes a kernel for each width.
        on_cpu = runner.device.type == "cpu"
        self.width = recurring if on_cpu and self._lora is None else exact
        self._scheduler_output: Any = None

    @property
    def source(self) -> "V1Step":
        return self

    @contextmanager
    def running(self, scheduler_output: Any) -> Iterator[None]:
        """Hold `scheduler_output` for the time its step runs. Steps do not nest."""
        assert self._scheduler_output is None, "a step is already in flight"
        self._scheduler_output = scheduler_output
        exit_layers = scheduler_output.exit_layers.values()
        self.deepest_exit = max(exit_layers, default=self._num_layers)
        try:
            yield
        finally:
            self._scheduler_output = None
            self.deepest_exit = self._num_layers
            if self._lora is not None:
                self._lora.restore()

    def replayed(self) -> None:
        """This runner has no graphs of ours."""

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
            [self._wanted_rows(r, query_lens[r]) for r in request_ids],
            [r in self._scheduler_output.shortcuts for r in request_ids],
        )
        if plan is None:
            return None
        if plan.is_plain:
            fill_slots(self.width(plan.num_rows))
            return plan
        narrow_attention(self._runner.attn_groups, plan, self.width)
        if self._lora is not None:
            self._lora.reorder(plan.row_order)
        return plan

    def enter_stage(self, stage: Stage) -> None:
        """Narrow what is indexed by row outside the forward context."""
        if self._lora is not None:
            self._lora.narrow(stage.num_rows)

    def probe_rows(self) -> ProbeRows | None:
        """The rows of the step's logits; `None` if none of them leaves by probe.

        The runner asks for other logits, those of prompts, after the step.
        """
        if self._scheduler_output is None:
            return None
        asked = {r: self._asked_probe(r) for r in self._runner.input_batch.req_ids}
        if not any(asked.values()):
            return None
        rows = [probe for r, probe in asked.items() for _ in range(self._sampled(r))]
        by_probe = (self._runner.requests[r] for r, probe in asked.items() if probe)
        columns = max(self._columns.needed(request.sampling_params) for request in by_probe)
        # Adapters can have heads of their own.
        return ProbeRows(rows, columns, head_takes_all=self._lora is not None)

    def allowed_tokens(self, most: int) -> tuple[int, ...] | None:
        """What the requests of the step, less those by probe, may answer with; `None` if more than
        `most` tokens.

        Drafts are checked against logits of their own, adapters can have heads of their own.
        """
        runner = self._runner
        if self._scheduler_output is None or self._lora is not None or runner.speculative_config:
            return None
        by_head = [r for r in runner.input_batch.req_ids if self._asked_probe(r) is None]
        return allowed_tokens(runner, by_head, most)

    @cached_property
    def _columns(self) -> SamplerColumns:
        return SamplerColumns(self._runner.vllm_config)

    def _asked_probe(self, request_id: str) -> AskedProbe | None:
        extra_args = self._runner.requests[request_id].sampling_params.extra_args
        return asked_probe(extra_args, self._num_layers)

    def _sampled(self, request_id: str) -> int:
        """How many of a request's rows the runner samples from: one more than it has drafts."""
        return 1 + len(self._scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))

    def _wanted_rows(self, request_id: str, query_len: int) -> int:
        """Last rows of a request whose hidden states the runner reads after the forward.

        Those to sample from; every row when the prompt is scored. LoRA maps all rows of a layer to
        adapters at once, so there none can drop out within.
        """
        if self._lora is not None or request_id in self._runner.num_prompt_logprobs:
            return query_len
        return self._sampled(request_id)


def fill_slots(width: int) -> None:
    """Give every layer a KV slot, or none, for each of so many rows; the last ones are filler."""
    context = get_forward_context()
    filled = {id(slots): fitted(slots, width, NO_SLOT) for slots in context.slot_mapping.values()}
    context.slot_mapping = {name: filled[id(slots)] for name, slots in context.slot_mapping.items()}


def narrow_attention(
    attn_groups: list[list[Any]], plan: TruncationPlan, width: Callable[[int], int] = exact
) -> None:
    """Give every layer the attention metadata and KV slots of the rows alive at it.

    width: as of `run_truncated`; filler has no slots.

    Built once for each stage and attention group, before the first layer runs; for depth segments,
    which have the same but for their blocks, once for each stage. Layers that nothing reaches get
    no entry, so that touching one is an error and not a stray write.
    """
    context = get_forward_context()
    metadata: dict[str, Any] = {}
    slots: dict[str, Any] = {}
    of_stage: dict[int, Any] = {}
    for group in (g for groups in attn_groups for g in groups):
        if group.layer_names[0] not in context.attn_metadata:  # of a segment out of reach
            continue
        builder = group.get_metadata_builder()
        whole = _InPlanOrder(context.attn_metadata[group.layer_names[0]], plan)
        for stage in plan.stages:
            names = names_within(group.layer_names, stage.first_layer, stage.end_layer)
            if not names:
                continue
            common = whole.at(stage, width(stage.num_rows))
            built = of_stage.get(stage.first_layer)
            if built is None or not builder.supports_update_block_table:
                built = of_stage[stage.first_layer] = builder.build(0, common)
            else:
                tables = common.block_table_tensor, common.slot_mapping
                built = builder.update_block_table(built, *tables)
            metadata.update(dict.fromkeys(names, built))
            slots.update(dict.fromkeys(names, common.slot_mapping))
    context.attn_metadata = metadata
    context.slot_mapping = slots


class _InPlanOrder:
    """One attention group's common metadata, taken back from what was built for the whole step."""

    def __init__(self, built: Any, plan: TruncationPlan) -> None:
        self._built = built
        self._seq_lens, self._block_table = built.seq_lens, built.block_table
        self.slot_mapping = built.slot_mapping
        if plan.request_order is not None:
            self._seq_lens = built.seq_lens[plan.request_order]
            self._block_table = built.block_table[plan.request_order]
            self.slot_mapping = built.slot_mapping[plan.row_order]

    def at(self, stage: Stage, width: int) -> CommonAttentionMetadata:
        """The part that is alive in `stage`: views of the first requests, queries of kept rows,
        slots of all and none for filler up to `width`."""
        requests = stage.num_requests
        return CommonAttentionMetadata(
            query_start_loc=stage.query_start_loc,
            query_start_loc_cpu=stage.query_start_loc,
            seq_lens=self._seq_lens[:requests],
            num_reqs=requests,
            num_actual_tokens=stage.num_kept,
            max_query_len=stage.max_query_len,
            max_seq_len=self._built.max_seq_len,
            block_table_tensor=self._block_table[:requests],
            slot_mapping=fitted(self.slot_mapping[: stage.num_rows], width, NO_SLOT),
            causal=self._built.causal,
        )
