"""Slots of all segments at once are those that vLLM's kernel computes for each table."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform
from vllm.v1.worker.block_table import MultiGroupBlockTable

from raee_serve_patches.segment_groups import SlotMapping

pytestmark = pytest.mark.unit

BLOCK, MAX_REQUESTS, MAX_ROWS, MAX_LEN, NUM_TABLES = 16, 5, 200, 160, 3
UNTOUCHED = -7


@pytest.fixture(scope="module")
def tables():
    current_platform.import_kernels()
    return MultiGroupBlockTable(
        max_num_reqs=MAX_REQUESTS,
        max_num_batched_tokens=MAX_ROWS,
        pin_memory=False,
        device=torch.device("cpu"),
        block_sizes=[BLOCK] * NUM_TABLES,
        max_num_blocks=[MAX_LEN // BLOCK] * NUM_TABLES,
    )


@given(
    requests=st.lists(
        st.tuples(st.integers(0, MAX_LEN - 41), st.integers(1, 40)),
        min_size=1,
        max_size=MAX_REQUESTS,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_slots_are_vllms(tables, requests, seed):
    """requests: (tokens computed before, rows of this step) of each."""
    rng = np.random.default_rng(seed)
    for table in tables.block_tables:
        table.block_table.np[:] = rng.integers(0, 1000, table.block_table.np.shape)
        table.slot_mapping.gpu.fill_(UNTOUCHED)
    lens = [rows for _, rows in requests]
    starts = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32)
    positions = torch.cat([torch.arange(done, done + rows) for done, rows in requests])

    SlotMapping(tables.block_tables)(len(requests), starts, positions)

    for table in tables.block_tables:
        expected = torch.full((MAX_ROWS,), UNTOUCHED)
        torch.ops._C.compute_slot_mapping_kernel_impl(
            starts, positions, table.block_table.cpu, expected, BLOCK
        )
        assert (table.slot_mapping.gpu[: len(positions)] == expected[: len(positions)]).all()
        assert (table.slot_mapping.gpu[len(positions) :] == UNTOUCHED).all()
