"""The one decoder loop that every supported architecture shares."""

from itertools import islice
from typing import Any

import torch
from torch import nn

from raee_serve.engine.plan import TruncationPlan


def run_truncated(
    decoder: nn.Module,
    plan: TruncationPlan,
    input_ids: torch.Tensor | None,
    positions: torch.Tensor,
    inputs_embeds: torch.Tensor | None = None,
    **layer_kwargs: Any,
) -> torch.Tensor:
    """Run each row through its own number of layers, then the final norm on all rows at once.

    decoder: a vLLM decoder stack with `embed_input_ids`, `layers` (each called as
        `layer(positions, hidden, residual)`) and `norm` (called as `norm(hidden, residual)`).
    input_ids, positions: [T]; inputs_embeds: [T, hidden_size], used instead of `input_ids`.
    Returns [T, hidden_size], in batch order.

    Hidden state and residual of a row that leaves stay apart until the final norm: vLLM adds
    them there in the norm's own precision, as it would in a checkpoint cut to that depth.
    """
    if plan.row_order is not None:
        positions = positions[plan.row_order]
        input_ids = None if input_ids is None else input_ids[plan.row_order]
        inputs_embeds = None if inputs_embeds is None else inputs_embeds[plan.row_order]
    hidden = decoder.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
    assert hidden.shape[0] == plan.num_rows, (hidden.shape, plan.num_rows)

    residual = None
    left: list[tuple[torch.Tensor, torch.Tensor]] = []
    for stage in plan.stages:
        if stage.num_rows < hidden.shape[0]:
            left.append((hidden[stage.num_rows :], residual[stage.num_rows :]))
            hidden, residual = hidden[: stage.num_rows], residual[: stage.num_rows]
            positions = positions[: stage.num_rows]
        for layer in islice(decoder.layers, stage.first_layer, stage.end_layer):
            hidden, residual = layer(positions, hidden, residual, **layer_kwargs)
    if left:
        left.append((hidden, residual))
        hidden = torch.cat([part for part, _ in reversed(left)])
        residual = torch.cat([part for _, part in reversed(left)])

    hidden, _ = decoder.norm(hidden, residual)
    return hidden if plan.row_place is None else hidden[plan.row_place]
