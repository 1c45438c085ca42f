"""Seam: compute the KV slots of a CPU's step without launching a kernel.

Upstream: `MultiGroupBlockTable.compute_slot_mapping` and of each `BlockTable` its `block_table`,
`slot_mapping` and `block_size`.
Checked on: vLLM 0.32.0, CPU attention.
Why no extension point serves: slots are computed by a Triton kernel on every platform, and on a CPU
its launch, once for each KV cache group, takes longer than the work of a decode step.
Retired by: a computation of slots that a platform can choose.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from raee_serve_patches.seam import Seam

_TABLES = "vllm.v1.worker.block_table"

SEAM = Seam(
    "slot_mapping",
    {
        f"{_TABLES}:MultiGroupBlockTable.compute_slot_mapping": "7927c57d8686",
        f"{_TABLES}:BlockTable.compute_slot_mapping": "1090515a52c5",
        f"{_TABLES}:BlockTable.__init__": "cd2baf66a86a",
    },
)


def compute_slots_on_host(runner: Any) -> None:
    """Make a V1 CPU runner, whose KV cache is laid out, compute its slots with NumPy.

    Raises `SeamError` where vLLM is another than it was written for.
    """
    SEAM.check()
    tables = runner.input_batch.block_table
    tables.compute_slot_mapping = partial(write_slots, tables.block_tables)


def write_slots(
    tables: Sequence[Any], num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
) -> None:
    """Write the slots of a step's token rows into the `slot_mapping` of each block table.

    query_start_loc: [>= num_reqs + 1] int32; positions: [>= num_rows] int64, in the text.
    """
    starts = query_start_loc[: num_reqs + 1].numpy()
    requests = np.repeat(np.arange(num_reqs), np.diff(starts))
    places = positions[: len(requests)].numpy()
    within = {size: np.divmod(places, size) for size in {table.block_size for table in tables}}
    for table in tables:
        block, offset = within[table.block_size]
        slots = table.slot_mapping.gpu[: len(requests)].numpy()
        np.multiply(table.block_table.np[requests, block], table.block_size, out=slots)
        slots += offset
