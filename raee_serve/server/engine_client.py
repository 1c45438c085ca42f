"""The engine as vLLM's endpoints see it: every request leaves with an exit layer of its own."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from raee_serve.engine.settings import EXIT_LAYER_KEY
from raee_serve.server.depths import PromptDepth, current_depths
from raee_serve.server.gate import Gate
from raee_serve.server.limits import with_first_tokens

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

RESERVED_PREFIX = "raee_"
"""Keys of `extra_args` that are ours alone; clients reach that dict through `vllm_xargs`."""


class DepthClient:
    """An `EngineClient` that adds exit layers; everything else is the wrapped client's.

    The middleware finds admission through the app's `engine_client`.
    """

    def __init__(self, engine: EngineClient, gate: Gate) -> None:
        self._engine = engine
        self._gate = gate
        self._unread = PromptDepth(gate.admission.default_layer)
        self._full = PromptDepth(gate.admission.num_layers)

    @property
    def gate(self) -> Gate:
        """The one that is to admit the next request."""
        return self._gate.latest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `EngineClient.generate`, at the depth decided for this prompt.

        Routes that admission does not read run at the server's default depth.
        """
        depths = current_depths()
        depth = self._unread if depths is None else depths.take() or self._full
        return self._engine.generate(prompt, at_depth(sampling_params, depth), *args, **kwargs)


def at_depth(params: SamplingParams, depth: PromptDepth) -> SamplingParams:
    """A copy of `params` at this depth, with a dict of its own and without client-sent keys.

    The prompts of one body share one `extra_args` dict, and `SamplingParams.clone` is shallow.
    """
    own = copy.copy(params)
    kept = {
        key: value
        for key, value in (params.extra_args or {}).items()
        if not key.startswith(RESERVED_PREFIX)
    }
    own.extra_args = kept | {EXIT_LAYER_KEY: depth.exit_layer}
    if depth.token_bias or depth.first_tokens:
        bias = dict(params.logit_bias or {})
        for token, value in depth.token_bias:
            bias[token] = bias.get(token, 0.0) + value
        own.logit_bias = with_first_tokens(bias, depth.first_tokens)
    return own
