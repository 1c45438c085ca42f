"""Segments that are replayed give what the layer loop gives, whatever pads them."""

from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raee_serve.engine.graph_layout import WASTE, captured_sizes, lay_out
from raee_serve.engine.graph_segments import PAD_SLOT, SegmentGraphs, StaticRows, StepRows
from raee_serve.engine.layer_loop import run_truncated
from raee_serve.engine.plan import plan_truncation
from raee_serve.exit_points import segments_between

pytestmark = pytest.mark.unit

NUM_LAYERS, HIDDEN = 6, 4
POINTS = (2, 3, 6)
SIZES = (1, 2, 5, 9)
VLLM_SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
"""vLLM's own capture sizes."""

exit_lists = st.lists(st.sampled_from(POINTS), min_size=1, max_size=SIZES[-1])


class Cache:
    """What a KV cache is to one layer: by slot, what a row wrote; no slot is written twice."""

    def __init__(self):
        self.written = {}

    def write(self, slots, rows):
        for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
            if slot != PAD_SLOT:
                assert slot not in self.written, f"slot {slot} is written twice"
                self.written[slot] = row


class InPlaceLayer(nn.Module):
    """As vLLM's layers, it adds to the residual in place and reads its metadata elsewhere."""

    def __init__(self, context, index):
        super().__init__()
        self.context, self.index, self.cache = context, index, Cache()

    def forward(self, positions, hidden, residual):
        residual = hidden.clone() if residual is None else residual.add_(hidden)
        slots, seq_lens = self.context["slots"], self.context["seq_lens"]
        assert positions.shape[0] == hidden.shape[0] == slots.shape[0] == seq_lens.shape[0]
        self.cache.write(slots, residual)
        change = torch.sin(residual * (self.index + 1) + positions[:, None] + seq_lens[:, None])
        return change.double(), residual


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.context = {}
        self.layers = nn.ModuleList(InPlaceLayer(self.context, i) for i in range(NUM_LAYERS))

    def embed_input_ids(self, input_ids):
        return input_ids[:, None].double() * torch.arange(1, HIDDEN + 1)

    def norm(self, hidden, residual):
        return hidden.add_(residual), residual

    def written(self):
        return [layer.cache.written for layer in self.layers]

    def forget(self):
        for layer in self.layers:
            layer.cache = Cache()


class StaticAttention:
    """Puts into the decoder's context what the buffers hold for a segment."""

    def __init__(self, decoder, rows):
        self.decoder, self.rows = decoder, rows

    @contextmanager
    def open(self, segment, size, alive, max_seq_len):
        rows = self.rows
        starts, seq_lens = rows.starts[segment, : size + 1], rows.seq_lens[segment, :size]
        assert starts.tolist() == [min(i, alive) for i in range(size + 1)]
        assert (seq_lens > 0).tolist() == [i < alive for i in range(size)]
        assert max_seq_len is None or max_seq_len >= seq_lens.max()
        slots = rows.slots[segment, 0, :size]
        self.decoder.context.update(slots=slots, seq_lens=seq_lens)
        yield
        self.decoder.context.clear()


def step_of(num_rows, seed):
    at_random = partial(torch.randint, generator=torch.Generator().manual_seed(seed))
    return StepRows(
        input_ids=at_random(1, 50, (num_rows,), dtype=torch.int32),
        positions=at_random(1, 50, (num_rows,)),
        seq_lens=at_random(1, 50, (num_rows,), dtype=torch.int32),
        slots=torch.randperm(100)[None, :num_rows],
        block_tables=[at_random(1, 50, (num_rows, 3), dtype=torch.int32)],
        max_seq_len=50,
    )


@pytest.fixture(scope="module")
def captured():
    decoder = Decoder()
    segments = segments_between(POINTS)
    table = torch.zeros(1, 3, dtype=torch.int32)
    rows = StaticRows(len(segments), SIZES[-1], HIDDEN, torch.float64, [table], torch.device("cpu"))
    attention = StaticAttention(decoder, rows)
    graphs = SegmentGraphs(
        decoder, decoder.layers, segments, SIZES, rows, attention, capture=lambda function: function
    )
    return decoder, graphs


def by_the_layer_loop(decoder, step, exit_layers):
    plan = plan_truncation(exit_layers, [1] * len(exit_layers), NUM_LAYERS)
    order = slice(None) if plan is None or plan.request_order is None else plan.request_order
    if plan is None:  # all at full depth: no plan, so the loop of one stage
        plan = plan_truncation([*exit_layers], [1] * len(exit_layers), NUM_LAYERS + 1)

    def enter(stage):
        slots, lens = step.slots[0][order], step.seq_lens[order]
        decoder.context.update(slots=slots[: stage.num_rows], seq_lens=lens[: stage.num_rows])

    return run_truncated(
        decoder, plan, step.input_ids, step.positions, residual_norm="", enter_stage=enter
    )


@given(st.lists(st.tuples(exit_lists, st.integers(0, 99)), min_size=1, max_size=3))
def test_replay_equals_the_layer_loop(captured, steps):
    """Step after step on the same memory: nothing of one is left in the next."""
    decoder, graphs = captured
    for exit_layers, seed in steps:
        step = step_of(len(exit_layers), seed)
        layout = lay_out(exit_layers, POINTS, SIZES)
        decoder.forget()
        order, alive = torch.from_numpy(layout.order), torch.tensor(layout.alive)
        replayed = graphs.run(step, layout, order, alive)
        written = decoder.written()

        decoder.forget()
        assert torch.equal(replayed, by_the_layer_loop(decoder, step, exit_layers))
        assert written == decoder.written()


@given(exit_lists)
def test_only_the_segments_needed_are_replayed(exit_layers):
    layout = lay_out(exit_layers, POINTS, SIZES)
    assert len(layout.sizes) == POINTS.index(max(exit_layers)) + 1
    assert all(n <= size for n, size in zip(layout.alive, layout.sizes, strict=True))
    assert all(size in SIZES for size in layout.sizes)
    smaller = [[s for s in SIZES if s < size] for size in layout.sizes]
    assert all(not s or s[-1] < n for s, n in zip(smaller, layout.alive, strict=True))
    leaving = [place for first, end in layout.leaving for place in range(first, end)]
    assert sorted(leaving) == list(range(len(exit_layers)))
    ordered = [exit_layers[i] for i in layout.order]
    assert ordered == sorted(exit_layers, reverse=True)


def test_what_no_graph_fits_has_no_layout():
    assert lay_out([4], POINTS, SIZES) is None
    assert lay_out([2] * 10, POINTS, SIZES) is None
    assert lay_out([2], POINTS, ()) is None


@given(st.sets(st.integers(1, 600)), st.integers(1, 600))
def test_captured_sizes_are_some_of_vllms(vanilla, max_rows):
    sizes = captured_sizes(sorted(vanilla), max_rows)
    usable = sorted(size for size in vanilla if size <= max_rows)
    assert set(sizes) <= set(usable) and list(sizes) == sorted(sizes)
    assert sizes[-1:] == tuple(usable[-1:])
    assert all(b >= WASTE * a for a, b in pairwise(sizes))


@pytest.mark.parametrize("max_rows", [64, 256, 512])
def test_graphs_take_less_than_half_of_the_memory_of_vllms(max_rows):
    """Counted in layers that are captured, which is what a graph's memory grows with: vLLM by
    default captures, at each size, all layers in one graph and all layers in pieces."""
    vllms = 2 * NUM_LAYERS * len([size for size in VLLM_SIZES if size <= max_rows])
    ours = captured_sizes(VLLM_SIZES, max_rows)
    assert NUM_LAYERS * len(ours) < 0.5 * vllms
    assert {1, max_rows} <= set(ours)
