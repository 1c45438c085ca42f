"""The guard while generating: early-exit text that falls into a loop starts again at full depth.

A degenerate answer is worse than a slow one. Nothing of the early answer is given on before it is
known not to loop: of a stream its first tokens, the *guard window*, are held back, and what loops
later goes on as it is; of a whole answer every token is read before any of it is given on.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from vllm.sampling_params import RequestOutputKind, SamplingParams

from raee_serve.server.loops import MIN_TOKENS, LoopDetector, LoopGuard

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput

Start = Callable[[SamplingParams], "AsyncGenerator[RequestOutput, None]"]
"""Generates the answer to the prompt at hand."""


def watches(guard: LoopGuard, params: SamplingParams) -> bool:
    """Whether an output under `params` could be caught at all."""
    is_long_enough = params.max_tokens is None or params.max_tokens >= MIN_TOKENS
    is_whole = params.output_kind is RequestOutputKind.FINAL_ONLY
    return is_long_enough and (is_whole or guard.window > 0)


async def without_loops(
    start: Start,
    early: SamplingParams,
    full: SamplingParams,
    window: int,
    on_restart: Callable[[], None],
) -> AsyncGenerator[RequestOutput, None]:
    """Outputs of `early`; if one of its completions is seen to loop, all of them are of `full`.

    on_restart: called when the first generation is aborted and the second one is to start.
    """
    is_whole = early.output_kind is RequestOutputKind.FINAL_ONLY
    if is_whole:
        early = copy.copy(early)
        early.output_kind = RequestOutputKind.CUMULATIVE  # to see a loop while it is short
    read = _Completions(early)
    async with aclosing(start(early)) as outputs:
        watched = _whole(outputs, read) if is_whole else _streamed(outputs, read, window)
        async with aclosing(watched):
            async for output in watched:
                yield output
    if not read.loop:
        return
    on_restart()
    async with aclosing(start(full)) as outputs:
        async for output in outputs:
            yield output


async def _streamed(
    outputs: AsyncGenerator[RequestOutput, None], read: _Completions, window: int
) -> AsyncGenerator[RequestOutput, None]:
    """All outputs, none of them before every completion is past the window; none if one loops."""
    held: list[RequestOutput] | None = []
    async for output in outputs:
        if held is None:
            yield output
            continue
        held.append(output)
        if read.finds_loop(output):
            return
        if read.are_past(window):
            for early in held:
                yield early
            held = None


async def _whole(
    outputs: AsyncGenerator[RequestOutput, None], read: _Completions
) -> AsyncGenerator[RequestOutput, None]:
    """The last output, with all completions, as FINAL_ONLY has it; none if one loops."""
    async for output in outputs:
        if read.finds_loop(output):
            return
        if output.finished:
            output.outputs = [read.finished[index] for index in sorted(read.finished)]
            yield output


class _Completions:
    """Reads the completions of one request as they grow.

    loop: whether one of them was seen to fall into a loop. finished: by index.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._is_delta = params.output_kind is RequestOutputKind.DELTA
        self._detectors = [LoopDetector() for _ in range(params.n)]
        self.loop = False
        self.finished: dict[int, CompletionOutput] = {}

    def finds_loop(self, output: RequestOutput) -> bool:
        """Reads what an output adds."""
        self.loop = any(map(self._loops, output.outputs))
        return self.loop

    def are_past(self, window: int) -> bool:
        """Whether every completion has as many tokens, or is at its end."""
        detectors = enumerate(self._detectors)
        return all(index in self.finished or len(read) >= window for index, read in detectors)

    def _loops(self, completion: CompletionOutput) -> bool:
        if completion.finished():
            self.finished[completion.index] = completion
        detector = self._detectors[completion.index]
        known = 0 if self._is_delta else len(detector)
        return detector.add_all(completion.token_ids[known:])
