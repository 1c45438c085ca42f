"""Mix-in that lets a vLLM causal language model run truncation plans."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from raee_serve.engine.layer_loop import run_truncated
from raee_serve.engine.narrow_head import most_tokens, narrow_logits
from raee_serve.engine.plan import Stage, TruncationPlan
from raee_serve.engine.probe_head import ProbeBank, ProbeRows
from raee_serve.engine.settings import WORKERS
from raee_serve.shortcuts import Shortcut


class StepSource(Protocol):
    """Knows the plan of the step in flight; the worker provides it."""

    def replayed(self) -> torch.Tensor | None:
        """What the stack gives for this forward, where graphs captured before have computed it."""
        ...

    def enter_forward(self) -> TruncationPlan | None:
        """The plan of this forward, its attention state already in place.

        `None` means that every request runs all layers, or that no step is in flight
        (profiling): the model then takes vLLM's own path.
        """
        ...

    def enter_stage(self, stage: Stage) -> None:
        """Called before the layers of each stage of that plan run."""
        ...

    def width(self, num_rows: int) -> int:
        """How many rows layers are to be given for so many: these, and filler."""
        ...

    def probe_rows(self) -> ProbeRows | None:
        """The rows of the next call of `compute_logits`, which samples the step in flight.

        `None` if none of them leaves by probe, and for calls that do not sample: of profiling, and
        for the log-probabilities of prompts.
        """
        ...

    def allowed_tokens(self, most: int) -> Sequence[int] | None:
        """The tokens that the step in flight is to choose among; `None` if more than `most`.

        Rows that leave by probe do not count.
        """
        ...


class TruncatedExecution:
    """Goes before the vLLM model class; `self.model` is its decoder stack.

    residual_norm: name of the norm in which the architecture's decoder layer adds attention
        output to the residual.

    Until a step source is attached the model is vLLM's own in every respect.
    """

    model: nn.Module
    residual_norm: ClassVar[str] = "post_attention_layernorm"
    _source: StepSource | None = None
    _probes: ProbeBank | None = None

    def attach(
        self,
        source: StepSource,
        shortcuts: Mapping[int, Shortcut] | None = None,
        probes: ProbeBank | None = None,
    ) -> None:
        """From now on the decoder stack asks `source` for the plan of each forward.

        shortcuts: by exit layer, in the model's dtype, on its device.
        probes: what rows that leave by probe are answered from; they are loaded later.

        The stack's forward is replaced, not this model's: a multimodal model that contains this
        one calls the stack directly. A compiled stack is entered by its compiled code and not by
        its forward; there it is this model's.
        """
        self._source, self._probes = source, probes
        decoder = self.model
        host = decoder if getattr(decoder, "do_not_compile", True) else self
        vanilla_forward = host.forward

        def forward(
            input_ids: torch.Tensor | None,
            positions: torch.Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            hidden = source.replayed()
            if hidden is not None:
                return hidden
            plan = source.enter_forward()
            if plan is None:
                return vanilla_forward(
                    input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
                )
            return run_truncated(
                decoder,
                plan,
                input_ids,
                positions,
                inputs_embeds,
                residual_norm=self.residual_norm,
                shortcuts=shortcuts,
                enter_stage=source.enter_stage,
                width=source.width,
                **kwargs,
            )

        host.forward = forward

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """As vLLM's, with the label columns of the rows that leave by probe.

        Where all rows do, the LM head is not touched and there are few columns.
        """
        rows = self._source.probe_rows() if self._source is not None else None
        if rows is None:
            return self._token_logits(hidden_states)
        return self._probes.logits(hidden_states, rows, self._token_logits)

    def _token_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """vLLM's; of the tokens alone that the step may choose among, where these are few."""
        head = getattr(self, "lm_head", None) or self.model.embed_tokens
        few = most_tokens(head) if self._source is not None else 0
        tokens = self._source.allowed_tokens(few) if few else None
        if tokens is None:
            return super().compute_logits(hidden_states)
        return narrow_logits(self.logits_processor, head, tokens, hidden_states)

    @property
    def get_model_state_cls(self) -> Callable[[], type]:
        """What model runner V2 calls, where a model has it, for the class of its model state.

        With a worker of ours alone: else vLLM is to choose as it does for its own models.
        """
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is None or config.parallel_config.worker_cls not in WORKERS:
            raise AttributeError("get_model_state_cls")
        from raee_serve.engine.model_state import TruncatingModelState

        return lambda: TruncatingModelState
