"""The one decoder loop that every supported architecture shares."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from raee_serve.engine.plan import Stage, TruncationPlan
from raee_serve.engine.row_widths import exact
from raee_serve.shortcuts import Shortcut


def run_truncated(
    decoder: nn.Module,
    plan: TruncationPlan,
    input_ids: torch.Tensor | None,
    positions: torch.Tensor,
    inputs_embeds: torch.Tensor | None = None,
    *,
    residual_norm: str,
    shortcuts: Mapping[int, Shortcut] | None = None,
    enter_stage: Callable[[Stage], None] | None = None,
    width: Callable[[int], int] = exact,
    **layer_kwargs: Any,
) -> torch.Tensor:
    """Run each row through its own number of layers, then the final norm on all rows at once.

    decoder: a vLLM decoder stack with `embed_input_ids`, `layers` (each called as
        `layer(positions, hidden, residual)`) and `norm` (called as `norm(hidden, residual)`).
    input_ids, positions: [T]; inputs_embeds: [T, hidden_size], used instead of `input_ids`.
    residual_norm: name of the norm in which a layer adds its attention output to the residual.
    shortcuts: by exit layer, those that the plan asks for; in the model's dtype.
    enter_stage: called before the layers of each stage run.
    width: of a number of rows, how many tensors are to have with filler; never less for more rows.
    Returns [T, hidden_size], in batch order; rows that the plan does not want hold the state of
    another row of their request.

    Hidden state and residual of a row that leaves stay apart until the final norm: vLLM adds
    them there in the norm's own precision, as it would in a checkpoint cut to that depth.
    """
    hidden = decoder.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
    assert hidden.shape[0] == plan.num_rows, (hidden.shape, plan.num_rows)
    if plan.row_order is not None:
        hidden, positions = hidden[plan.row_order], positions[plan.row_order]

    residual = None
    rows = plan.num_rows
    left: list[tuple[torch.Tensor, torch.Tensor]] = []
    for stage in plan.stages:
        wide = width(stage.num_rows)
        if stage.num_rows < rows:
            leaving = hidden[stage.num_rows : rows], residual[stage.num_rows : rows]
            # As filler of the others they would be changed in place.
            left.append(leaving if wide == stage.num_rows else tuple(map(torch.clone, leaving)))
        hidden, positions = fitted(hidden, wide), fitted(positions, wide)
        residual = None if residual is None else fitted(residual, wide)
        if enter_stage is not None:
            enter_stage(stage)
        for layer in islice(decoder.layers, stage.first_layer, stage.end_layer):
            if stage.kept_rows is None:
                hidden, residual = layer(positions, hidden, residual, **layer_kwargs)
                continue
            with keeping_rows(layer, residual_norm, fitted(stage.kept_rows, width(stage.num_kept))):
                hidden, residual = layer(positions, hidden, residual, **layer_kwargs)
        rows = stage.num_kept
        if stage.num_shortcut:
            assert shortcuts is not None, f"no shortcut at layer {stage.end_layer}"
            shortcut = shortcuts[stage.end_layer]
            take_shortcut(hidden[:rows], residual[:rows], stage.num_shortcut, shortcut)
    hidden, residual = hidden[:rows], residual[:rows]
    if left:
        left.append((hidden, residual))
        hidden = torch.cat([part for part, _ in reversed(left)])
        residual = torch.cat([part for _, part in reversed(left)])

    hidden, _ = decoder.norm(hidden, residual)
    return hidden if plan.row_place is None else hidden[plan.row_place]


def fitted(tensor: torch.Tensor, num_rows: int, filler: int = 0) -> torch.Tensor:
    """`tensor` with so many rows: its first ones, or all of them and then rows of `filler`."""
    missing = num_rows - tensor.shape[0]
    if missing <= 0:
        return tensor[:num_rows]
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing), value=filler)


def take_shortcut(
    hidden: torch.Tensor, residual: torch.Tensor, num_rows: int, shortcut: Shortcut
) -> None:
    """Put the last rows' state, in place, where the shortcut sees the last layer's.

    What the final norm is to add up is then the mapped state and nothing.
    """
    rows = slice(hidden.shape[0] - num_rows, None)
    hidden[rows] = shortcut(hidden[rows] + residual[rows])
    residual[rows] = 0


@contextmanager
def keeping_rows(layer: nn.Module, residual_norm: str, rows: torch.Tensor) -> Iterator[None]:
    """While open, `layer` takes all rows and gives back `rows` of them.

    Every row's key and value reach the KV cache; queries, and with them all that follows in
    the layer, are those of `rows`. The layer's own forward runs; its input is narrowed at the
    two places where whole rows would meet.
    """
    hooks = (
        layer.self_attn.attn.register_forward_pre_hook(
            lambda _, args: (args[0][rows], *args[1:]),
        ),
        getattr(layer, residual_norm).register_forward_pre_hook(
            lambda _, args: (args[0], args[1][rows]),
        ),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
