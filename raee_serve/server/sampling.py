"""`--sample-full`: a share of the prompts runs once more at the other depth, and is compared.

The second run starts after the answer was sent, so that it can neither fail nor hold up the
request. How often the two agree is live quality monitoring without labels.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

MAX_RUNNING = 4
"""Second runs under way at once; what is drawn beyond that is dropped."""


@dataclass(frozen=True, slots=True)
class Rerun:
    """start: generates the answer once more, at the other depth. tokens: of the answer."""

    task: str
    start: Callable[[], AsyncGenerator[RequestOutput, None]]
    tokens: tuple[int, ...]


class Answer:
    """tokens: of a prompt's first completion, collected from its outputs."""

    def __init__(self, *, is_delta: bool) -> None:
        self._is_delta = is_delta
        self.tokens: tuple[int, ...] = ()

    def add(self, output: RequestOutput) -> None:
        for completion in output.outputs:
            if completion.index == 0:
                own = tuple(completion.token_ids)
                self.tokens = self.tokens + own if self._is_delta else own


class CountsAgreement(Protocol):
    """What `DecisionMetrics` does with second runs."""

    def rerun(self, outcome: str) -> None:
        """One more drawn prompt; outcome: compared, busy, failed or not-greedy."""
        ...

    def agreement(self, task: str, share: float) -> None:
        """Of one compared prompt, within 0..1."""
        ...


class FullDepthSampler:
    """Draws prompts, and runs the drawn ones again in the background.

    share: of the prompts, 0..1. seed: of the draw.
    """

    def __init__(self, share: float, metrics: CountsAgreement, seed: int | None = None) -> None:
        self._share = share
        self._metrics = metrics
        self._random = random.Random(seed)
        self._running: set[asyncio.Task[None]] = set()
        self._logged = False

    def draws(self, params: SamplingParams) -> bool:
        """Whether a prompt is to be compared; only greedy ones, for others differ by chance."""
        if self._random.random() >= self._share:
            return False
        if params.temperature > 0:
            self._metrics.rerun("not-greedy")
            return False
        return True

    def submit(self, reruns: Sequence[Rerun]) -> None:
        """Start them, or as many as there is room for."""
        for rerun in reruns:
            if len(self._running) >= MAX_RUNNING:
                self._metrics.rerun("busy")
                continue
            task = asyncio.get_running_loop().create_task(self._compare(rerun))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def close(self) -> None:
        """Give up what is under way."""
        for task in self._running:
            task.cancel()

    async def _compare(self, rerun: Rerun) -> None:
        try:
            again = Answer(is_delta=False)
            async for output in rerun.start():
                again.add(output)
        except Exception as error:  # never the request's concern, which was answered long ago
            self._metrics.rerun("failed")
            self._log_once(error)
            return
        self._metrics.rerun("compared")
        self._metrics.agreement(rerun.task, agreement(rerun.tokens, again.tokens))

    def _log_once(self, error: Exception) -> None:
        if not self._logged:
            self._logged = True
            logger.error("A second run (--sample-full) failed; more are counted.", exc_info=error)


def agreement(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of the longer answer before the first difference: 1 if they are the same."""
    if one == other:
        return 1.0
    pairs = zip(one, other, strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return same / max(len(one), len(other))
