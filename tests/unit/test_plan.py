"""Truncation plans: every row runs exactly its own layers, and nothing else moves."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raee_serve.engine.layer_loop import run_truncated
from raee_serve.engine.plan import plan_truncation
from raee_serve.engine.row_widths import exact, recurring

pytestmark = pytest.mark.unit

NUM_LAYERS = 6


@st.composite
def batches(draw):
    """Exit layer, rows, rows wanted after the last layer, and whether these leave through the
    shortcut, of each of up to 12 requests."""
    requests = []
    for _ in range(draw(st.integers(1, 12))):
        query_len = draw(st.integers(1, 5))
        wanted = draw(st.integers(1, query_len))
        depth = draw(st.integers(1, NUM_LAYERS))
        requests.append((depth, query_len, wanted, depth < NUM_LAYERS and draw(st.booleans())))
    return requests


def planned(requests):
    exits, lens, wanted, shortcuts = zip(*requests, strict=True)
    return plan_truncation(exits, lens, NUM_LAYERS, wanted, shortcuts)


class CountingLayer(nn.Module):
    """Adds its own power of two to the residual of each row, half in attention, half in the MLP.

    Like vLLM's layers it hands all keys to the cache and adds attention's output to the residual
    in a norm; unlike them it records which rows came where.
    """

    def __init__(self, index):
        super().__init__()
        self.half = 2.0**index / 2
        self.self_attn = nn.Module()
        self.self_attn.attn = RecordingAttention()
        self.rejoin = Rejoin()

    def forward(self, positions, hidden, residual):
        residual = hidden if residual is None else residual + hidden
        assert positions.shape[0] == hidden.shape[0] == residual.shape[0]
        self.positions = positions
        attended = self.self_attn.attn(residual, residual[:, 1])
        hidden, residual = self.rejoin(self.added(attended), residual)
        return self.added(hidden), residual

    def added(self, state):
        return torch.tensor([self.half, 0.0]).expand_as(state).double()


class RecordingAttention(nn.Module):
    def forward(self, query, key):
        self.queries, self.keys = query[:, 1], key
        return query


class Rejoin(nn.Module):
    def forward(self, hidden, residual):
        assert hidden.shape == residual.shape
        return hidden, residual + hidden


class CountingDecoder(nn.Module):
    """Its final state holds, for every row, which layers ran on it, and the row's own number."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(CountingLayer(i) for i in range(NUM_LAYERS))
        self.shortcuts = {d: partial(self.through, d) for d in range(1, NUM_LAYERS)}
        self.mapped = []

    def through(self, depth, states):
        """The shortcut after so many layers: takes a thousand times their number off."""
        self.mapped += states[:, 1].tolist()
        return states - torch.tensor([1000.0 * depth, 0.0]).double()

    @staticmethod
    def embed_input_ids(input_ids):
        return torch.stack([torch.zeros_like(input_ids), input_ids], dim=1).double()

    @staticmethod
    def norm(hidden, residual):
        return hidden + residual, None

    def run(self, plan, rows, width=exact):
        how = {"residual_norm": "rejoin", "shortcuts": self.shortcuts, "width": width}
        return run_truncated(self, plan, rows, rows, **how)


def by_sevens(num_rows):
    """Filler for nearly every number of rows there is in these tests."""
    return -(-num_rows // 7) * 7


WIDTHS = st.sampled_from([exact, by_sevens, recurring])


def rows_of(requests):
    """The numbers of each request's rows, in batch order; unlike any count of layers."""
    rows = torch.arange(sum(n for _, n, *_ in requests)) + 100
    return rows.split([n for _, n, *_ in requests])


@given(batches(), WIDTHS)
def test_wanted_rows_run_exactly_the_layers_of_their_request(requests, width):
    plan = planned(requests)
    if plan is None:
        assert {d for d, *_ in requests} == {NUM_LAYERS}
        return
    rows = rows_of(requests)
    out = CountingDecoder().run(plan, torch.cat(rows), width).split([len(r) for r in rows])
    for (depth, _, wanted, shortcut), own, state in zip(requests, rows, out, strict=True):
        assert torch.equal(state[-wanted:, 1], own[-wanted:].double())
        assert (state[:, 0] == 2.0**depth - 1 - 1000 * depth * shortcut).all()
        assert set(state[:, 1].tolist()) <= set(own.tolist())


@given(batches(), WIDTHS)
def test_shortcuts_map_wanted_rows_alone(requests, width):
    plan = planned(requests)
    if plan is None:
        return
    decoder, rows = CountingDecoder(), rows_of(requests)
    decoder.run(plan, torch.cat(rows), width)
    expected = [r[-w:] for (*_, w, shortcut), r in zip(requests, rows, strict=True) if shortcut]
    assert sorted(decoder.mapped) == torch.cat([*expected, torch.empty(0)]).tolist()


@given(batches(), WIDTHS)
def test_every_row_writes_its_key_in_each_layer_it_runs(requests, width):
    plan = planned(requests)
    if plan is None:
        return
    decoder = CountingDecoder()
    rows = rows_of(requests)
    decoder.run(plan, torch.cat(rows), width)
    for index in range(max(d for d, *_ in requests)):
        attention = decoder.layers[index].self_attn.attn
        alive = [(d, r, w) for (d, _, w, _), r in zip(requests, rows, strict=True) if d > index]
        queries = torch.cat([r[-w:] if d == index + 1 else r for d, r, w in alive])
        keys = torch.cat([r for _, r, _ in alive])
        # What comes after them is filler.
        assert len(attention.keys) == width(len(keys))
        assert sorted(attention.keys[: len(keys)].tolist()) == keys.tolist()
        positions = decoder.layers[index].positions
        assert torch.equal(positions[: len(keys)], attention.keys[: len(keys)])
        assert sorted(attention.queries[: len(queries)].tolist()) == queries.tolist()


@given(batches())
def test_stages_cover_the_layers_and_shrink(requests):
    plan = planned(requests)
    if plan is None:
        return
    assert plan.stages[0].first_layer == 0
    assert plan.stages[-1].end_layer == max(d for d, *_ in requests)
    assert plan.num_rows == sum(n for _, n, *_ in requests)
    for earlier, later in pairwise(plan.stages):
        assert earlier.end_layer == later.first_layer
        assert earlier.num_rows >= later.num_rows
    for stage in plan.stages:
        alive = [(d, n, w) for d, n, w, _ in requests if d >= stage.end_layer]
        drops = stage.kept_rows is not None
        kept = [w if drops and d == stage.end_layer else n for d, n, w in alive]
        assert stage.num_requests == len(alive)
        assert stage.num_rows == sum(n for _, n, _ in alive)
        assert stage.num_kept == sum(kept)
        assert stage.max_query_len == max(kept)
        assert sorted(stage.query_start_loc.diff().tolist()) == sorted(kept)


@given(batches())
def test_rows_of_a_request_stay_together_in_plan_order(requests):
    plan = planned(requests)
    if plan is None or plan.row_order is None:
        return
    rows = rows_of(requests)
    expected = torch.cat([rows[i] for i in plan.request_order.tolist()])
    assert torch.equal(torch.cat(rows)[plan.row_order], expected)


def test_a_layer_is_itself_again_after_dropping_rows():
    decoder = CountingDecoder()
    rows = torch.arange(4) + 100
    decoder.run(plan_truncation([2, 3], [3, 1], NUM_LAYERS, [1, 1]), rows)
    whole = decoder.run(plan_truncation([3], [4], NUM_LAYERS), rows)
    assert torch.equal(whole[:, 1], rows.double())


def test_uniform_depth_moves_no_row():
    plan = plan_truncation([3, 3, 3], [1, 4, 2], NUM_LAYERS)
    assert plan.is_plain
    assert plan.row_order is None and plan.row_place is None


def test_heads_of_one_depth_are_told_apart_in_an_unmoved_or_moved_batch():
    sorted_already = plan_truncation([3, 3], [1, 2], NUM_LAYERS, shortcuts=[False, True])
    assert sorted_already.is_plain and sorted_already.stages[0].num_shortcut == 2
    moved = plan_truncation([3, 3], [1, 2], NUM_LAYERS, shortcuts=[True, False])
    assert not moved.is_plain and moved.stages[0].num_shortcut == 1
    assert moved.request_order.tolist() == [1, 0]


def test_a_shortcut_at_full_depth_is_refused():
    with pytest.raises(ValueError, match=r"exit layers 1\.\.5"):
        plan_truncation([2, NUM_LAYERS], [1, 1], NUM_LAYERS, shortcuts=[False, True])


def test_a_long_prompt_keeps_one_row_of_its_last_layer():
    plan = plan_truncation([3], [500], NUM_LAYERS, [1])
    assert [(s.first_layer, s.end_layer, s.num_kept) for s in plan.stages] == [
        (0, 2, 500),
        (2, 3, 1),
    ]


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


@pytest.mark.parametrize("wanted", [[0, 1], [1, 3]])
def test_wanted_length_out_of_range_is_named(wanted):
    with pytest.raises(ValueError, match=r"wanted lengths .* allowed: 1\.\.\[1, 2\]"):
        plan_truncation([1, 2], [1, 2], NUM_LAYERS, wanted)


@given(batches())
def test_a_moved_plan_is_the_same_with_its_indices_elsewhere(requests):
    plan = planned(requests)
    if plan is None:
        return
    moved = plan.moved(lambda indices: indices + 100)
    for name in ("request_order", "row_order", "row_place"):
        before, after = getattr(plan, name), getattr(moved, name)
        assert after is None if before is None else torch.equal(after, before + 100)
    for before, after in zip(plan.stages, moved.stages, strict=True):
        assert (after.num_kept, after.num_shortcut) == (before.num_kept, before.num_shortcut)
        assert after.query_start_loc is before.query_start_loc
        if before.kept_rows is not None:
            assert torch.equal(after.kept_rows, before.kept_rows + 100)


@given(st.integers(1, 2048), st.integers(1, 2048))
def test_recurring_widths_hold_their_rows_and_are_few(some, more):
    assert some <= recurring(some) <= some + 127 and recurring(recurring(some)) == recurring(some)
    assert (recurring(some) <= recurring(more)) or some > more
    assert len({recurring(n) for n in range(1, 2049)}) == 80
