"""Slots computed on the host are what vLLM's kernel computes, for groups of any block size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform
from vllm.v1.worker.block_table import MultiGroupBlockTable

from raee_serve_patches.slot_mapping import write_slots

pytestmark = pytest.mark.unit

BLOCK_SIZES, MAX_REQUESTS, MAX_ROWS, MAX_LEN = (16, 48), 5, 200, 144
UNTOUCHED = -7


@pytest.fixture(scope="module")
def tables():
    current_platform.import_kernels()
    made = MultiGroupBlockTable(
        max_num_reqs=MAX_REQUESTS,
        max_num_batched_tokens=MAX_ROWS,
        pin_memory=False,
        device=torch.device("cpu"),
        block_sizes=list(BLOCK_SIZES),
        max_num_blocks=[MAX_LEN // size for size in BLOCK_SIZES],
    )
    return made.block_tables


@given(
    requests=st.lists(
        st.tuples(st.integers(0, MAX_LEN - 40), st.integers(1, 40)),
        min_size=1,
        max_size=MAX_REQUESTS,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_slots_are_vllms(tables, requests, seed):
    """requests: (tokens computed before, rows of this step) of each."""
    rng = np.random.default_rng(seed)
    for table in tables:
        table.block_table.np[:] = rng.integers(0, 1000, table.block_table.np.shape)
        table.slot_mapping.gpu.fill_(UNTOUCHED)
    starts = torch.tensor([0, *np.cumsum([rows for _, rows in requests])], dtype=torch.int32)
    positions = torch.cat([torch.arange(done, done + rows) for done, rows in requests])

    write_slots(tables, len(requests), starts, positions)

    for table in tables:
        expected = torch.full((MAX_ROWS,), UNTOUCHED)
        torch.ops._C.compute_slot_mapping_kernel_impl(
            starts, positions, table.block_table.cpu, expected, table.block_size
        )
        assert (table.slot_mapping.gpu[: len(positions)] == expected[: len(positions)]).all()
        assert (table.slot_mapping.gpu[len(positions) :] == UNTOUCHED).all()
