"""Model runner V2's state of a model that runs truncated: exits of requests, plan of the step."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.utils import AttentionGroup

from raee_serve.engine.graph_layout import GraphLayout, captured_sizes, lay_out
from raee_serve.engine.graph_segments import Capture, Layer, SegmentGraphs, StaticRows, StepRows
from raee_serve.engine.plan import Stage, TruncationPlan, plan_truncation
from raee_serve.engine.probe_head import AskedProbe, ProbeRows, asked_probe
from raee_serve.engine.row_widths import exact
from raee_serve.engine.scheduler import Exits
from raee_serve.exit_points import segments_between
from raee_serve_patches.compiled_layers import CompiledLayers
from raee_serve_patches.sampler_columns import SamplerColumns
from raee_serve_patches.v2_graphs import CudaGraphs, GraphAttention, capturing
from raee_serve_patches.v2_step import StageAttention


class AskedExit(NamedTuple):
    """What the plan and the head have to know of one request.

    is_scored: somebody wants log-probabilities of its prompt, and with them all of its rows.
    probe: the one it leaves through, if it does.
    columns: so many columns the sampler needs for it, see `ProbeRows`.
    """

    layer: int
    is_shortcut: bool = False
    is_scored: bool = False
    probe: AskedProbe | None = None
    columns: int = 0


class TruncatingModelState(DefaultModelState):
    """vLLM's own state, plus a truncation plan for each step; a `StepSource` for the model.

    It is vLLM's in every respect until `follow` is called. A truncated step runs from captured
    graphs where they have its shape, else layer by layer.
    """

    _exits: Exits | None = None
    _points: tuple[int, ...] = ()
    _graphs: SegmentGraphs | None = None
    _plan: TruncationPlan | None = None
    _attention: StageAttention | None = None
    _graphed: tuple[StepRows, GraphLayout] | None = None
    _probe_rows: ProbeRows | None = None

    def follow(self, decoder: nn.Module, exits: Exits, points: tuple[int, ...]) -> None:
        """From now on requests run at the exits they ask for.

        decoder: the stack whose layers are captured between `points`, full depth the last of them.
        """
        self._decoder, self._exits, self._points = decoder, exits, points
        self._asked: dict[str, AskedExit] = {}

    @cached_property
    def _layers(self) -> CompiledLayers:
        """Once for all captures, so that they share what is compiled."""
        return CompiledLayers(self.vllm_config, self._decoder.layers)

    @cached_property
    def _columns(self) -> SamplerColumns:
        return SamplerColumns(self.vllm_config)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        if self._exits is not None and params is not None:
            layer, head = self._exits.of(new_req_data)
            ids = params.prompt_logprob_token_ids
            is_scored = params.prompt_logprobs is not None or ids is not None
            probe = asked_probe(params.extra_args, self._exits.num_layers)
            columns = 0 if probe is None else self._columns.needed(params)
            self._asked[new_req_data.req_id] = AskedExit(
                layer, head == "shortcut", is_scored, probe, columns
            )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        if self._exits is not None:
            self._asked.pop(req_id, None)

    def initialize_kv_cache(self, *args: Any) -> None:
        super().initialize_kv_cache(*args)
        self._graphs = None  # what was captured on another cache, to see how much memory it takes

    def capture_inner_cudagraphs(
        self,
        input_buffers: InputBuffers,
        block_tables: BlockTables,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
    ) -> None:
        """Capture the segments between exit points, at a choice of the sizes vLLM captures.

        Only beside whole graphs of vLLM's: without these, attention back ends keep what a graph
        reads in fresh memory. And only on token ids, which is all that segments begin with.
        """
        config = self.vllm_config.compilation_config
        if self._exits is None or self.prompt_embeds_state is not None:
            return
        sizes = captured_sizes(config.cudagraph_capture_sizes or (), self.max_num_reqs)
        if not (sizes and config.cudagraph_mode.has_full_cudagraphs()):
            return
        with capturing(self.device), self._layers.open() as layers:
            self._graphs = self.segment_graphs(
                sizes, block_tables, attn_groups, CudaGraphs(self.vllm_config), layers
            )

    def segment_graphs(
        self,
        sizes: Sequence[int],
        block_tables: BlockTables,
        attn_groups: list[list[AttentionGroup]],
        capture: Capture,
        layers: Sequence[Layer],
    ) -> SegmentGraphs:
        """All segments at all sizes, captured by `capture`. layers: what they run of the stack."""
        segments = segments_between(self._points)
        tables = block_tables.get_dummy_block_tables(1)
        hidden_size = self.model_config.get_hidden_size()
        rows = StaticRows(len(segments), sizes[-1], hidden_size, self.dtype, tables, self.device)
        attention = GraphAttention(self.vllm_config, rows, segments, attn_groups)
        return SegmentGraphs(self._decoder, layers, segments, sizes, rows, attention, capture)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Plan the step. Metadata are vLLM's where they serve all layers, else they come later,
        for each stage or graph at its entrance.
        """
        self._plan = self._attention = self._graphed = None
        asked = self._asked_in(input_batch)
        self._probe_rows = _probe_rows(input_batch, asked)
        if any(exit.layer < self._exits.num_layers for exit in asked):
            assert cudagraph_mode == CUDAGraphMode.NONE, f"{cudagraph_mode} graph of all layers"
            if layout := self._layout(input_batch, asked):
                rows = _rows(input_batch, block_tables, slot_mappings)
                self._graphed = rows, layout
                return {}
            plan = _plan(input_batch, asked, self._exits.num_layers)
            if not plan.is_plain:
                self._plan = plan.moved(lambda t: async_tensor_h2d(t, device=self.device))
                self._attention = StageAttention(
                    self._plan, input_batch, block_tables, slot_mappings, attn_groups
                )
                return {}
            self._plan = plan
        return super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            *args,
            **kwargs,
        )

    def replayed(self) -> torch.Tensor | None:
        """Final states of a step that graphs were captured for."""
        if self._graphed is None:
            return None
        (rows, layout), self._graphed = self._graphed, None
        indices = np.concatenate((layout.order, layout.alive))
        order, alive = async_tensor_h2d(indices, device=self.device).split(
            (len(layout.order), len(layout.alive))
        )
        return self._graphs.run(rows, layout, order, alive)

    def enter_forward(self) -> TruncationPlan | None:
        """The plan that `prepare_attn` made for this forward; profiling runs have none."""
        plan, self._plan = self._plan, None
        return plan

    def enter_stage(self, stage: Stage) -> None:
        if self._attention is not None:
            self._attention.enter(stage)

    def width(self, num_rows: int) -> int:
        """No filler: this runner is for GPUs, whose kernels take any number of rows."""
        return exact(num_rows)

    def probe_rows(self) -> ProbeRows | None:
        """The rows of the step that `prepare_attn` prepared, the first time it is asked.

        The runner samples before it asks for other logits, those of prompts.
        """
        rows, self._probe_rows = self._probe_rows, None
        return rows

    def allowed_tokens(self, most: int) -> None:
        """Not known here: this runner keeps what requests may answer with on the device."""

    def _asked_in(self, input_batch: InputBatch) -> list[AskedExit]:
        """The exits of a step's requests, in batch order; none before `follow`.

        All that is asked here is known to the CPU: async scheduling waits for nothing.
        """
        if self._exits is None:
            return []
        # Dummy batches have request ids of their own, which nobody added.
        whole = AskedExit(self._exits.num_layers)
        return [self._asked.get(request_id, whole) for request_id in input_batch.req_ids]

    def _layout(self, input_batch: InputBatch, asked: list[AskedExit]) -> GraphLayout | None:
        """Graphs are of one row a request, and end in the plain head."""
        is_decode = input_batch.num_tokens == input_batch.num_reqs
        if self._graphs is None or not is_decode or any(exit.is_shortcut for exit in asked):
            return None
        return lay_out([exit.layer for exit in asked], self._points, self._graphs.sizes)


def _plan(input_batch: InputBatch, asked: list[AskedExit], num_layers: int) -> TruncationPlan:
    lens, sampled = input_batch.num_scheduled_tokens.tolist(), _sampled(input_batch)
    plan = plan_truncation(
        [exit.layer for exit in asked],
        lens,
        num_layers,
        [n if e.is_scored else s for e, n, s in zip(asked, lens, sampled, strict=True)],
        [exit.is_shortcut for exit in asked],
    )
    assert plan is not None  # for one of them is truncated
    return plan


def _probe_rows(input_batch: InputBatch, asked: list[AskedExit]) -> ProbeRows | None:
    if not any(exit.probe for exit in asked):
        return None
    exits = zip(asked, _sampled(input_batch), strict=True)
    return ProbeRows(
        [exit.probe for exit, num_rows in exits for _ in range(num_rows)],
        max(exit.columns for exit in asked),
    )


def _sampled(input_batch: InputBatch) -> list[int]:
    """How many rows of each request are sampled from: one more than it has drafts."""
    drafts = input_batch.num_draft_tokens_per_req
    return [1] * input_batch.num_reqs if drafts is None else (drafts + 1).tolist()


def _rows(
    input_batch: InputBatch, block_tables: Sequence[torch.Tensor], slot_mappings: torch.Tensor
) -> StepRows:
    num_rows = input_batch.num_reqs
    return StepRows(
        input_batch.input_ids[:num_rows],
        input_batch.positions[:num_rows],
        input_batch.seq_lens[:num_rows],
        slot_mappings[:, :num_rows],
        [table[:num_rows] for table in block_tables],
        int(input_batch.seq_lens_cpu_upper_bound[:num_rows].max()),
    )
