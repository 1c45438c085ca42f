"""The engine as vLLM's endpoints see it: every request leaves with an exit layer of its own."""

from __future__ import annotations

import copy
import uuid
from asyncio import AbstractEventLoop
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from raee_serve.engine.settings import at_exit
from raee_serve.server.depths import PromptDepth, RequestDepths, current_depths
from raee_serve.server.gate import Gate
from raee_serve.server.label_answers import as_labels
from raee_serve.server.limits import with_first_tokens
from raee_serve.server.loop_guard import Start, watches, without_loops
from raee_serve.server.sampling import Answer, Rerun

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput

ABORT_S = 1.0
"""In which clients are told that their requests were aborted, before the engine is killed."""


class DepthClient:
    """An `EngineClient` that adds exit layers; everything else is the wrapped client's.

    The middleware finds admission through the app's `engine_client`.

    loop: that the engine is awaited on.
    """

    def __init__(self, engine: EngineClient, gate: Gate, loop: AbstractEventLoop) -> None:
        self._engine = engine
        self._gate = gate
        self._loop = loop
        self._unread = PromptDepth(gate.admission.default_layer)
        self._full = PromptDepth(gate.admission.num_layers)
        self.is_stopping = False

    @property
    def gate(self) -> Gate:
        """The one that is to admit the next request."""
        return self._gate.latest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def shutdown(self, timeout: float | None = None) -> None:
        """As `EngineClient.shutdown`, which answers what is under way and takes nothing new.

        What is unanswered after `timeout` seconds is aborted before the engine is killed: killed
        with requests in it, it tells some of their clients that it crashed, and the others wait.
        Called on another thread than the loop's, as vLLM does.
        """
        self.is_stopping = True
        answer_s = timeout or 0.0
        self._loop.call_soon_threadsafe(self._loop.call_later, answer_s, self._abort_unanswered)
        self._engine.shutdown(timeout=answer_s + ABORT_S)

    def _abort_unanswered(self) -> None:
        processor: Any = self._engine.output_processor
        processor.abort_requests(list(processor.request_states), internal=True)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `EngineClient.generate`, at the depth decided for this prompt.

        Routes that admission does not read run at the server's default depth.
        """
        start = partial(self._engine.generate, prompt, request_id=request_id, **kwargs)
        depths = current_depths()
        if depths is None:
            return start(at_depth(sampling_params, self._unread))
        position, found = depths.take()
        depth = found or self._full
        outputs = self._outputs(start, sampling_params, depth, depths, position)
        if depth.comparison is None:
            return outputs
        sampler = self.gate.sampler
        if sampler is None or not sampler.draws(self._own(sampling_params, depth)):
            return outputs
        kwargs["trace_headers"] = None  # no part of the client's trace
        anew = partial(self._engine.generate, prompt, request_id=f"raee-{uuid.uuid4()}", **kwargs)
        other = partial(self._once_more, anew, sampling_params, depth.comparison.depth)
        is_delta = sampling_params.output_kind is RequestOutputKind.DELTA
        task = depth.comparison.task
        return _noting(outputs, Answer(is_delta=is_delta), depths, partial(Rerun, task, other))

    def _outputs(
        self,
        start: Start,
        params: SamplingParams,
        depth: PromptDepth,
        depths: RequestDepths,
        position: int,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Of the prompt at this position: its label, or under its loop guard if it has one."""
        own, guard, answer = self._own(params, depth), depth.guard, depth.answer
        if answer is not None:
            note = partial(depths.labels.__setitem__, position)
            return as_labels(start(own), answer, params.num_logprobs, note)
        if guard is None or not watches(guard, own):
            return start(own)

        def note_restart() -> None:
            depths.restarted.add(position)
            self.gate.metrics.restarted(guard.task)

        full = at_depth(params, self._full)
        return without_loops(start, own, full, guard.window, note_restart)

    def _once_more(
        self, start: Start, params: SamplingParams, depth: PromptDepth
    ) -> AsyncGenerator[RequestOutput, None]:
        """A second run, of which only the first completion's tokens count."""
        again = copy.copy(params)
        again.n, again.logprobs, again.prompt_logprobs = 1, None, None
        again.output_kind = RequestOutputKind.FINAL_ONLY
        outputs = start(self._own(again, depth))
        if depth.answer is None:
            return outputs
        return as_labels(outputs, depth.answer, None, lambda _: None)

    def _own(self, params: SamplingParams, depth: PromptDepth) -> SamplingParams:
        """What to ask of the engine for a prompt at this depth."""
        if depth.answer is None:
            return at_depth(params, depth)
        most = self._engine.vllm_config.model_config.max_logprobs
        return depth.answer.params(params, depth.exit_layer, most)


async def _noting(
    outputs: AsyncGenerator[RequestOutput, None],
    answer: Answer,
    depths: RequestDepths,
    rerun: Callable[[tuple[int, ...]], Rerun],
) -> AsyncGenerator[RequestOutput, None]:
    """`outputs` as they come; once they are complete, the prompt is to run again."""
    async with aclosing(outputs):
        async for output in outputs:
            answer.add(output)
            yield output
    depths.reruns.append(rerun(answer.tokens))


def at_depth(params: SamplingParams, depth: PromptDepth) -> SamplingParams:
    """A copy of `params` at this depth, where the LM head answers."""
    own = at_exit(params, depth.exit_layer, depth.head)
    if depth.first_tokens:
        own.logit_bias = with_first_tokens(params.logit_bias or {}, depth.first_tokens)
    return own
