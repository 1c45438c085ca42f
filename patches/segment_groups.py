"""Seam: what vLLM computes anew for each KV cache group of a step, once for all depth segments.

Upstream: `MultiGroupBlockTable.compute_slot_mapping` and `commit_block_table`;
`GPUModelRunner._get_slot_mappings` and `_build_attention_metadata`;
`CPUModelRunner._postprocess_tensors`.
Checked on: vLLM 0.32.0, CPU attention.
Why no extension point serves: segments have the same metadata but different specs, which is what
makes them groups, and vLLM prepares a step for one group after the other; the CPU's metadata
builder cannot swap block tables; and slots are computed also for groups that no request reaches.
Retired by: `update_block_table` in the CPU's builder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch

from raee_serve_patches.seam import Seam
from raee_serve_patches.slot_mapping import SEAM as SLOTS
from raee_serve_patches.slot_mapping import write_slots

_TABLES = "vllm.v1.worker.block_table"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_ATTENTION = "vllm.v1.attention.backends.cpu_attn"

SEAM = Seam(
    "segment_groups",
    {
        f"{_TABLES}:MultiGroupBlockTable.commit_block_table": "4cf21d03c0ac",
        f"{_RUNNER}._build_attention_metadata": "6015ffa2b3ec",
        f"{_RUNNER}._get_slot_mappings": "a7830268c258",
        f"{_RUNNER}.initialize_kv_cache": "95985f4cf7f6",
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner._postprocess_tensors": "7ec5969f31a7",
        f"{_ATTENTION}:CPUAttentionMetadataBuilder": "7594b0d1e049",
        f"{_ATTENTION}:CPUAttentionMetadata": "f342a75c3ef9",
    },
)


class DeepestExit(Protocol):
    """Knows how deep the step in flight goes."""

    deepest_exit: int
    """Its deepest exit layer; the number of layers when no step is in flight."""


def share_between_segments(runner: Any, step: DeepestExit) -> None:
    """Make a V1 CPU runner, whose KV cache is one of segments, compute once what they share.

    Raises `SeamError` where vLLM is another than it was written for.
    """
    SEAM.check()
    SLOTS.check()
    for attn_groups in runner.attn_groups:
        for group in attn_groups:
            builder = group.get_metadata_builder()
            builder.supports_update_block_table = True
            builder.update_block_table = _with_block_table
    # Made anew for several groups: copies to the device are again none, as with one group.
    runner._postprocess_tensors()
    shared = OfFirstGroup(runner, step)
    runner.input_batch.block_table.commit_block_table = shared.commit_block_table
    runner.input_batch.block_table.compute_slot_mapping = shared.compute_slot_mapping
    runner._get_slot_mappings = shared.slot_mappings
    runner._build_attention_metadata = shared.attention_metadata


def _with_block_table(metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
    return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class OfFirstGroup:
    """Has vLLM prepare a step for the runner's first KV cache group alone.

    The others that the step reaches get the same, with their own blocks and slots.
    """

    def __init__(self, runner: Any, step: DeepestExit) -> None:
        """Of one block size, and with block tables that the device shares with the host."""
        self._step = step
        self._config = runner.kv_cache_config  # the runner's own copy
        self._groups = self._config.kv_cache_groups
        self._tables = runner.input_batch.block_table.block_tables
        assert len({table.block_size for table in self._tables}) == 1, "segments differ in blocks"
        self._get_slot_mappings = runner._get_slot_mappings
        self._build_attention_metadata = runner._build_attention_metadata

    def commit_block_table(self, num_reqs: int) -> None:
        """Nothing: the device reads the host's."""

    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """As `write_slots`, of the tables that the step reaches."""
        write_slots(self._tables[: self._num_reached()], num_reqs, query_start_loc, positions)

    def slot_mappings(
        self, num_tokens_padded: int, num_reqs_padded: int, num_tokens_unpadded: int, **kwargs: Any
    ) -> tuple[dict[int, torch.Tensor], dict[str, torch.Tensor]]:
        """Slots of the token rows, by group and by layer; of rows that only pad the batch, -1."""
        with self._first_alone():
            by_group, by_layer = self._get_slot_mappings(
                num_tokens_padded, num_reqs_padded, num_tokens_unpadded, **kwargs
            )
        for gid in range(1, self._num_reached()):
            slots = self._tables[gid].slot_mapping.gpu[:num_tokens_padded]
            if num_tokens_padded > num_tokens_unpadded:
                slots[num_tokens_unpadded:] = -1
            by_group[gid] = slots
            by_layer.update(dict.fromkeys(self._groups[gid].layer_names, slots))
        return by_group, by_layer

    def attention_metadata(
        self, *args: Any, slot_mappings: dict[int, torch.Tensor], **kwargs: Any
    ) -> tuple[dict[str, Any], Any]:
        """Metadata by layer, and what vLLM's drafters want of the first group."""
        with self._first_alone():
            by_layer, common = self._build_attention_metadata(
                *args, slot_mappings=slot_mappings, **kwargs
            )
        first = by_layer[self._groups[0].layer_names[0]]
        for gid in range(1, self._num_reached()):
            blocks = self._tables[gid].get_device_tensor(len(first.block_table))
            own = _with_block_table(first, blocks, slot_mappings[gid])
            by_layer.update(dict.fromkeys(self._groups[gid].layer_names, own))
        return by_layer, common

    def _num_reached(self) -> int:
        """So many of the first groups are of segments that the step reaches."""
        deepest = self._step.deepest_exit
        return sum(group.kv_cache_spec.segment.is_reached(deepest) for group in self._groups)

    @contextmanager
    def _first_alone(self) -> Iterator[None]:
        self._config.kv_cache_groups = self._groups[:1]
        try:
            yield
        finally:
            self._config.kv_cache_groups = self._groups
