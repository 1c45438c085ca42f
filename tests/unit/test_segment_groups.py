"""Slots of all segments at once are those that vLLM's kernel computes for each table."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform
from vllm.v1.worker.block_table import MultiGroupBlockTable

from raee_serve.engine.segments import segments_of
from raee_serve_patches.segment_groups import OfFirstGroup

pytestmark = pytest.mark.unit

BLOCK, MAX_REQUESTS, MAX_ROWS, MAX_LEN, NUM_TABLES, NUM_LAYERS = 16, 5, 200, 160, 3, 6
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


@pytest.fixture(scope="module")
def runner(tables):
    """What is read of a runner; the methods are not called here."""
    groups = [
        SimpleNamespace(kv_cache_spec=SimpleNamespace(segment=segment))
        for segment in segments_of(NUM_LAYERS, NUM_TABLES)
    ]
    return SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=groups),
        input_batch=SimpleNamespace(block_table=tables),
        _get_slot_mappings=None,
        _build_attention_metadata=None,
    )


@given(
    requests=st.lists(
        st.tuples(st.integers(0, MAX_LEN - 41), st.integers(1, 40)),
        min_size=1,
        max_size=MAX_REQUESTS,
    ),
    deepest_exit=st.integers(1, NUM_LAYERS),
    seed=st.integers(0, 2**32 - 1),
)
def test_slots_are_vllms(tables, runner, requests, deepest_exit, seed):
    """requests: (tokens computed before, rows of this step) of each."""
    rng = np.random.default_rng(seed)
    for table in tables.block_tables:
        table.block_table.np[:] = rng.integers(0, 1000, table.block_table.np.shape)
        table.slot_mapping.gpu.fill_(UNTOUCHED)
    lens = [rows for _, rows in requests]
    starts = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32)
    positions = torch.cat([torch.arange(done, done + rows) for done, rows in requests])

    shared = OfFirstGroup(runner, SimpleNamespace(deepest_exit=deepest_exit))
    shared.compute_slot_mapping(len(requests), starts, positions)

    num_reached = -(-deepest_exit * NUM_TABLES // NUM_LAYERS)
    for table in tables.block_tables[num_reached:]:
        assert (table.slot_mapping.gpu == UNTOUCHED).all()
    for table in tables.block_tables[:num_reached]:
        expected = torch.full((MAX_ROWS,), UNTOUCHED)
        torch.ops._C.compute_slot_mapping_kernel_impl(
            starts, positions, table.block_table.cpu, expected, BLOCK
        )
        assert (table.slot_mapping.gpu[: len(positions)] == expected[: len(positions)]).all()
        assert (table.slot_mapping.gpu[len(positions) :] == UNTOUCHED).all()
