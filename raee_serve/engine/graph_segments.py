"""Truncated decode steps as CUDA graphs: one graph for each segment of layers and batch size.

A step's rows are put in order once, requests that go deepest first, into buffers that every graph
reads and writes in place. Rows leave from the end, so each segment works on the first rows and is
replayed at the captured size next above their number. The rows that pad it have left already, or
never were: their own state was put away, they write no keys and values, and attention passes them
by.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from raee_serve.engine.graph_layout import GraphLayout

PAD_SLOT = -1
"""vLLM's number of the KV slot of a row that is not to be written."""

Layer = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""Called as (positions, hidden, residual), gives the two states."""
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function once, or more, and gives what does it all again on the same memory."""


@dataclass(frozen=True)
class StepRows:
    """A decode step of R requests as the runner has it, one row each, in batch order.

    input_ids, positions, seq_lens: [R]; slots: [KV cache groups, R];
    block_tables: for each KV cache group [R, blocks].
    max_seq_len: at least the greatest of `seq_lens`.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    block_tables: Sequence[torch.Tensor]
    max_seq_len: int


class StaticRows:
    """The memory that graphs read and write, for up to `max_rows` rows, in the order of a layout.

    hidden, residual: [max_rows, hidden_size], state of the rows alive.
    left_hidden, left_residual: the same of the rows that have left.
    Of each segment, for what pads it differs: seq_lens [segments, max_rows], 0 where it pads;
    starts [segments, max_rows + 1], query starts, level where it pads; slots [segments, KV cache
    groups, max_rows], PAD_SLOT where it pads.
    """

    def __init__(
        self,
        num_segments: int,
        max_rows: int,
        hidden_size: int,
        dtype: torch.dtype,
        block_tables: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        """block_tables: for each KV cache group, of the width and dtype that steps have."""

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.input_ids = zeros(max_rows, dtype=torch.int32)
        self.positions = zeros(max_rows, dtype=torch.int64)
        self.hidden, self.residual, self.left_hidden, self.left_residual = (
            zeros(max_rows, hidden_size, dtype=dtype) for _ in range(4)
        )
        self.block_tables = [zeros(max_rows, t.shape[1], dtype=t.dtype) for t in block_tables]
        self.seq_lens = zeros(num_segments, max_rows, dtype=torch.int32)
        self.starts = zeros(num_segments, max_rows + 1, dtype=torch.int32)
        self.slots = zeros(num_segments, len(block_tables), max_rows, dtype=torch.int64)
        self._places = torch.arange(max_rows + 1, dtype=torch.int32, device=device)

    def fill(self, step: StepRows, order: torch.Tensor, alive: torch.Tensor) -> None:
        """Take a step's rows in. Nothing here waits for the device.

        order: [R] int64, alive: [segments that are replayed] int32, both where the rows are.
        """
        num_rows, used = len(order), len(alive)
        self.input_ids[:num_rows] = step.input_ids[order]
        self.positions[:num_rows] = step.positions[order]
        for static, table in zip(self.block_tables, step.block_tables, strict=True):
            static[:num_rows] = table[order]
        starts = torch.minimum(self._places, alive[:, None])
        self.starts[:used] = starts
        is_alive = self._places[:-1] < alive[:, None]
        lens, slots = self._widened(step.seq_lens[order]), self._widened(step.slots[:, order])
        self.seq_lens[:used] = torch.where(is_alive, lens, 0)
        self.slots[:used] = torch.where(is_alive[:, None], slots, PAD_SLOT)

    def fill_dummy(self) -> None:
        """Rows of one token each, which write nothing: what graphs are captured on."""
        self.input_ids.zero_()
        self.positions.zero_()
        for table in self.block_tables:
            table.zero_()
        self.starts[:] = self._places
        self.seq_lens.fill_(1)
        self.slots.fill_(PAD_SLOT)

    def put_away(self, first: int, end: int) -> None:
        """Keep the state of rows `first .. end - 1`, which leave, from what pads with them."""
        if first < end:
            self.left_hidden[first:end] = self.hidden[first:end]
            self.left_residual[first:end] = self.residual[first:end]

    def _widened(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [..., R] as [..., max_rows]; what is added is not looked at."""
        missing = len(self._places) - 1 - values.shape[-1]
        return nn.functional.pad(values, (0, missing))


class SegmentAttention(Protocol):
    """Attention metadata of one segment at one size, on `StaticRows`."""

    def open(
        self, segment: int, size: int, alive: int, max_seq_len: int | None
    ) -> AbstractContextManager[None]:
        """While open, layers of the segment run on the first `size` rows, `alive` of them real.

        max_seq_len: None for a capture, which is to serve every length.
        """
        ...


class SegmentGraphs:
    """The graphs of one model, and the steps that are replayed from them.

    sizes: the batch sizes there are graphs for, in order.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layers: Sequence[Layer],
        segments: Sequence[tuple[int, int]],
        sizes: Sequence[int],
        rows: StaticRows,
        attention: SegmentAttention,
        capture: Capture,
    ) -> None:
        """Captures all: the largest first, in whose memory the others fit.

        decoder: see `run_truncated`; layers: its layers, or what was compiled of them.
        segments: first and end layer of each, in order; sizes: in order.
        """
        self._decoder = decoder
        self._layers = layers
        self._segments = segments
        self._rows = rows
        self._attention = attention
        self.sizes = tuple(sizes)
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}
        rows.fill_dummy()
        for size in reversed(self.sizes):
            for segment in range(len(segments)):
                with attention.open(segment, size, size, max_seq_len=None):
                    self._replays[segment, size] = capture(self._function(segment, size))

    def run(
        self, step: StepRows, layout: GraphLayout, order: torch.Tensor, alive: torch.Tensor
    ) -> torch.Tensor:
        """[R, hidden_size] after the final norm, in batch order.

        order, alive: the layout's, where the rows are.
        """
        rows = self._rows
        rows.fill(step, order, alive)
        steps = zip(layout.sizes, layout.alive, layout.leaving, strict=True)
        for segment, (size, num_alive, leaving) in enumerate(steps):
            # Metadata are made segment by segment: back ends keep some in one buffer for all.
            with self._attention.open(segment, size, num_alive, step.max_seq_len):
                self._replays[segment, size]()
            rows.put_away(*leaving)
        num_rows = len(order)
        state, _ = self._decoder.norm(rows.left_hidden[:num_rows], rows.left_residual[:num_rows])
        hidden = torch.empty_like(state)
        hidden[order] = state
        return hidden

    def _function(self, segment: int, size: int) -> Callable[[], None]:
        rows, decoder = self._rows, self._decoder
        first, end = self._segments[segment]
        layers = self._layers[first:end]
        positions = rows.positions[:size]
        kept = rows.hidden[:size], rows.residual[:size]

        def run() -> None:
            if first == 0:
                hidden, residual = decoder.embed_input_ids(rows.input_ids[:size]), None
            else:
                # Layers may work in place; the first norm of a segment then does so on the buffers,
                # which are written again below.
                hidden, residual = kept
            for layer in layers:
                hidden, residual = layer(positions, hidden, residual)
            kept[0].copy_(hidden)
            kept[1].copy_(residual)

        return run
