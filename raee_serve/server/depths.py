"""How the prompts of the HTTP request at hand are to run: from the middleware to the engine client.

A context variable carries it past vLLM's endpoints, which know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from raee_serve.records import ExitHead
from raee_serve.server.label_answers import LabelAnswer, Probabilities
from raee_serve.server.loops import LoopGuard
from raee_serve.server.sampling import Rerun


@dataclass(frozen=True, slots=True)
class PromptDepth:
    """exit_layer: 1..num_layers.

    head: what turns the state after the exit layer into logits; of no account beside `answer`.
    answer: the label that a probe is to tell; None where the LM head answers.
    first_tokens: of which one is to be sampled first; empty: any.
    comparison: how it runs once more, after its answer, if it is drawn; None: never.
    guard: how its output is watched for loops; None: not at all.
    """

    exit_layer: int
    head: ExitHead = "plain"
    answer: LabelAnswer | None = None
    first_tokens: tuple[int, ...] = ()
    comparison: Comparison | None = None
    guard: LoopGuard | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The other depth of a prompt, and the task that it counts for."""

    depth: PromptDepth
    task: str


class RequestDepths:
    """The depths of one HTTP request's prompts, handed out in prompt order.

    vLLM's endpoints start one generation per prompt, in order. Only beam search starts more, and
    then all prompts of the request are to run alike.

    reruns: of the drawn prompts that were answered in full; the engine client adds to it.
    restarted: positions of the prompts that looped and are answered at full depth; likewise.
    labels: by position the probabilities of the labels, where the engine told some; likewise.
    """

    def __init__(self, depths: Sequence[PromptDepth]) -> None:
        self._depths = tuple(depths)
        self._are_alike = len(set(depths)) == 1
        self._given = 0
        self.reruns: list[Rerun] = []
        self.restarted: set[int] = set()
        self.labels: dict[int, Probabilities] = {}

    def take(self) -> tuple[int, PromptDepth | None]:
        """Position and depth of the next prompt; None once every prompt has had its own."""
        position = self._given
        self._given += 1
        if self._are_alike:
            return position, self._depths[0]
        return position, self._depths[position] if position < len(self._depths) else None


_current: ContextVar[RequestDepths | None] = ContextVar("raee_request_depths", default=None)


@contextmanager
def request_depths(depths: RequestDepths | None) -> Iterator[None]:
    """Within it, and in tasks started from it, generations run at these depths.

    None for a request that admission does not read. It must be said, not left out: uvicorn starts
    a pipelined request in the context of the one before it.
    """
    token = _current.set(depths)
    try:
        yield
    finally:
        _current.reset(token)


def current_depths() -> RequestDepths | None:
    """Of the request in whose context this is called; None if admission did not read it."""
    return _current.get()
