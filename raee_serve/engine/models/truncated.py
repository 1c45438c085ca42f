"""Mix-in that lets a vLLM causal language model run truncation plans."""

from typing import Any, Protocol

import torch
from torch import nn

from raee_serve.engine.layer_loop import run_truncated
from raee_serve.engine.plan import TruncationPlan


class StepSource(Protocol):
    """Knows the plan of the step in flight; the worker provides it."""

    def enter_forward(self) -> TruncationPlan | None:
        """The plan of this forward, its attention state already in place.

        `None` means that every request runs all layers, or that no step is in flight
        (profiling): the model then takes vLLM's own path.
        """
        ...


class TruncatedExecution:
    """Goes before the vLLM model class; `self.model` is its decoder stack.

    Until a step source is attached the model is vLLM's own in every respect.
    """

    model: nn.Module

    def attach(self, source: StepSource) -> None:
        """From now on the decoder stack asks `source` for the plan of each forward.

        The stack's forward is replaced, not this model's: a multimodal model that contains this
        one calls the stack directly.
        """
        decoder = self.model
        vanilla_forward = decoder.forward

        def forward(
            input_ids: torch.Tensor | None,
            positions: torch.Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            plan = source.enter_forward()
            if plan is None:
                return vanilla_forward(
                    input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
                )
            return run_truncated(decoder, plan, input_ids, positions, inputs_embeds, **kwargs)

        decoder.forward = forward
