"""Truncation plans: every row runs exactly its own layers, and nothing else moves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raee_serve.engine.layer_loop import run_truncated
from raee_serve.engine.plan import plan_truncation

pytestmark = pytest.mark.unit

NUM_LAYERS = 6
REQUESTS = st.lists(
    st.tuples(st.integers(1, NUM_LAYERS), st.integers(1, 5)), min_size=1, max_size=12
)


class CountingDecoder:
    """Each layer adds its own power of two to the residual of the rows it is given."""

    def __init__(self):
        self.layers = [self._layer(i) for i in range(NUM_LAYERS)]

    @staticmethod
    def _layer(index):
        def layer(positions, hidden, residual):
            residual = hidden if residual is None else residual + hidden
            assert positions.shape[0] == hidden.shape[0] == residual.shape[0]
            assert torch.equal(positions, residual[:, 1])
            added = torch.zeros_like(hidden)
            added[:, 0] = 2.0**index
            return added, residual

        return layer

    @staticmethod
    def embed_input_ids(input_ids):
        return torch.stack([torch.zeros_like(input_ids), input_ids], dim=1).double()

    @staticmethod
    def norm(hidden, residual):
        return hidden + residual, None


@given(REQUESTS)
def test_each_row_runs_exactly_the_layers_of_its_request(requests):
    exits, lens = zip(*requests, strict=True)
    plan = plan_truncation(exits, lens, NUM_LAYERS)
    if plan is None:
        assert set(exits) == {NUM_LAYERS}
        return
    rows = torch.arange(sum(lens)) + 100
    out = run_truncated(CountingDecoder(), plan, rows, rows)
    expected = torch.tensor([2.0**d - 1 for d in exits]).repeat_interleave(torch.tensor(lens))
    assert torch.equal(out[:, 0], expected.double())
    assert torch.equal(out[:, 1], rows.double())


@given(REQUESTS)
def test_stages_cover_the_layers_and_shrink(requests):
    exits, lens = zip(*requests, strict=True)
    plan = plan_truncation(exits, lens, NUM_LAYERS)
    if plan is None:
        return
    assert plan.stages[0].first_layer == 0
    assert plan.stages[-1].end_layer == max(exits)
    assert plan.num_rows == sum(lens)
    for earlier, later in zip(plan.stages, plan.stages[1:], strict=False):
        assert earlier.end_layer == later.first_layer
        assert earlier.num_rows > later.num_rows
        assert earlier.num_requests > later.num_requests
    for stage in plan.stages:
        alive = [n for d, n in requests if d >= stage.end_layer]
        assert stage.num_requests == len(alive)
        assert stage.num_rows == sum(alive)
        assert stage.max_query_len == max(alive)


@given(REQUESTS)
def test_orders_are_inverse_and_keep_a_requests_rows_together(requests):
    exits, lens = zip(*requests, strict=True)
    plan = plan_truncation(exits, lens, NUM_LAYERS)
    if plan is None or plan.row_order is None:
        return
    assert torch.equal(plan.row_order[plan.row_place], torch.arange(sum(lens)))
    starts = torch.cumsum(torch.tensor((0, *lens)), 0)
    for place, request in enumerate(plan.request_order.tolist()):
        begin, end = plan.query_start_loc[place : place + 2].tolist()
        expected = torch.arange(starts[request], starts[request + 1])
        assert torch.equal(plan.row_order[begin:end], expected)


def test_uniform_depth_moves_no_row():
    plan = plan_truncation([3, 3, 3], [1, 4, 2], NUM_LAYERS)
    assert plan.is_uniform
    assert plan.row_order is None


def test_batch_already_deepest_first_moves_no_row():
    plan = plan_truncation([5, 3, 3, 1], [1, 4, 2, 1], NUM_LAYERS)
    assert len(plan.stages) == 3
    assert plan.row_order is None


def test_full_depth_needs_no_plan():
    assert plan_truncation([NUM_LAYERS] * 3, [1, 2, 3], NUM_LAYERS) is None


@pytest.mark.parametrize("exits", [[0, 3], [3, NUM_LAYERS + 1], [-1, 2]])
def test_exit_layer_out_of_range_is_named(exits):
    with pytest.raises(ValueError, match=r"allowed: 1\.\.6"):
        plan_truncation(exits, [1, 1], NUM_LAYERS)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="one for each"):
        plan_truncation([1, 2], [1], NUM_LAYERS)
