"""The engine as vLLM's endpoints see it: every request leaves with an exit layer of its own."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from raee_serve.engine.settings import EXIT_LAYER_KEY
from raee_serve.server.gate import Gate

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

RESERVED_PREFIX = "raee_"
"""Keys of `extra_args` that are ours alone; clients reach that dict through `vllm_xargs`."""


class RequestDepths:
    """The exit layers of one HTTP request's prompts, handed out in prompt order.

    vLLM's endpoints start one generation per prompt, in order. Only beam search starts more, and
    then all prompts of the request have the same depth.
    """

    def __init__(self, exit_layers: Sequence[int]) -> None:
        self._exit_layers = tuple(exit_layers)
        self._given = 0

    def take(self) -> int | None:
        """The next prompt's exit layer; None once every prompt has had its own."""
        if len(set(self._exit_layers)) == 1:
            return self._exit_layers[0]
        if self._given == len(self._exit_layers):
            return None
        self._given += 1
        return self._exit_layers[self._given - 1]


_depths: ContextVar[RequestDepths | None] = ContextVar("raee_request_depths", default=None)


@contextmanager
def request_depths(exit_layers: Sequence[int] | None) -> Iterator[None]:
    """Within it, and in tasks started from it, generations run at these exit layers.

    None for a request that admission does not read. It must be said, not left out: uvicorn starts
    a pipelined request in the context of the one before it.
    """
    token = _depths.set(None if exit_layers is None else RequestDepths(exit_layers))
    try:
        yield
    finally:
        _depths.reset(token)


class DepthClient:
    """An `EngineClient` that adds exit layers; everything else is the wrapped client's.

    gate: where the middleware finds admission, through the app's `engine_client`.
    """

    def __init__(self, engine: EngineClient, gate: Gate) -> None:
        self._engine = engine
        self.gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `EngineClient.generate`, at the depth decided for this prompt.

        Routes that admission does not read run at the server's default depth.
        """
        depths = _depths.get()
        exit_layer = None if depths is None else depths.take()
        if exit_layer is None:
            admission = self.gate.admission
            exit_layer = admission.default_layer if depths is None else admission.num_layers
        params = with_exit_layer(sampling_params, exit_layer)
        return self._engine.generate(prompt, params, *args, **kwargs)


def with_exit_layer(params: SamplingParams, exit_layer: int) -> SamplingParams:
    """A copy of `params` at this depth, with a dict of its own and without client-sent keys.

    The prompts of one body share one `extra_args` dict, and `SamplingParams.clone` is shallow.
    """
    own = copy.copy(params)
    kept = {
        key: value
        for key, value in (params.extra_args or {}).items()
        if not key.startswith(RESERVED_PREFIX)
    }
    own.extra_args = kept | {EXIT_LAYER_KEY: exit_layer}
    return own
