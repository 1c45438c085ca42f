"""Seam: what vLLM computes anew for each KV cache group of a step, once for all depth segments.

Upstream: `MultiGroupBlockTable.compute_slot_mapping`; in `GPUModelRunner._build_attention_metadata`
the reuse of one group's metadata for another of an equal spec, with that one's block table;
`CPUModelRunner._postprocess_tensors`.
Checked on: vLLM 0.32.0, CPU attention.
Why no extension point serves: segments have the same metadata but different specs, which is what
makes them groups; the CPU's metadata builder cannot swap block tables; and slots are computed by a
kernel for each group, whose launch costs more than the work of a decode step.
Retired by: `update_block_table` in the CPU's builder, and one computation of slots for all groups.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from raee_serve_patches.seam import Seam

_TABLES = "vllm.v1.worker.block_table"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_ATTENTION = "vllm.v1.attention.backends.cpu_attn"

SEAM = Seam(
    "segment_groups",
    {
        f"{_TABLES}:MultiGroupBlockTable.compute_slot_mapping": "7927c57d8686",
        f"{_TABLES}:BlockTable.compute_slot_mapping": "1090515a52c5",
        f"{_TABLES}:BlockTable.__init__": "cd2baf66a86a",
        f"{_RUNNER}._build_attention_metadata": "6015ffa2b3ec",
        f"{_RUNNER}.initialize_kv_cache": "95985f4cf7f6",
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner._postprocess_tensors": "7ec5969f31a7",
        f"{_ATTENTION}:CPUAttentionMetadataBuilder": "7594b0d1e049",
        f"{_ATTENTION}:CPUAttentionMetadata": "f342a75c3ef9",
    },
)


def share_between_segments(runner: Any) -> None:
    """Make a V1 CPU runner, whose KV cache is one of segments, compute once what they share.

    Raises `SeamError` where vLLM is another than it was written for.
    """
    SEAM.check()
    groups = runner.kv_cache_config.kv_cache_groups  # the runner's own copy
    for group in groups[1:]:
        group.kv_cache_spec = groups[0].kv_cache_spec
    for attn_groups in runner.attn_groups:
        for group in attn_groups:
            builder = group.get_metadata_builder()
            builder.supports_update_block_table = True
            builder.update_block_table = _with_block_table
    # Made anew for several groups: copies to the device are again none, as with one group.
    runner._postprocess_tensors()
    tables = runner.input_batch.block_table
    tables.compute_slot_mapping = SlotMapping(tables.block_tables)


def _with_block_table(metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
    return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class SlotMapping:
    """Writes the KV slots of a step's token rows into each table's `slot_mapping`."""

    def __init__(self, tables: list[Any]) -> None:
        """tables: vLLM's block tables, all of one block size."""
        [self._block_size] = {table.block_size for table in tables}
        self._tables = tables

    def __call__(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """query_start_loc: [>= num_reqs + 1] int32; positions: [>= num_rows] int64, in the text."""
        starts = query_start_loc[: num_reqs + 1].numpy()
        requests = np.repeat(np.arange(num_reqs), np.diff(starts))
        place, offset = np.divmod(positions[: len(requests)].numpy(), self._block_size)
        for table in self._tables:
            slots = table.slot_mapping.gpu[: len(requests)].numpy()
            np.multiply(table.block_table.np[requests, place], self._block_size, out=slots)
            slots += offset
