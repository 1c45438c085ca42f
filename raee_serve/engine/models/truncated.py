"""Mix-in that lets a vLLM causal language model run a truncation plan."""

from typing import Any, Protocol

import torch

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
    """Goes before the vLLM model class; `self.model` is its decoder stack."""

    step_source: StepSource | None = None

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        plan = self.step_source.enter_forward() if self.step_source is not None else None
        if plan is None:
            return super().forward(  # type: ignore[misc]
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )
        return run_truncated(
            self.model,  # type: ignore[attr-defined]
            plan,
            input_ids,
            positions,
            inputs_embeds,
            **kwargs,
        )
