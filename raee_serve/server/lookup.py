"""Look-ups of concurrent requests, batched on one thread beside the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.server.daemon_thread import DaemonThread

logger = logging.getLogger(__name__)

MAX_BATCH = 32
"""Prompts decided at once; a batch holds up everyone behind it for as long as it is encoded."""

CLOSE_TIMEOUT_S = 2.0
"""A batch under way takes much less; one that takes longer hangs."""

Decide = Callable[[Sequence[Lookup]], list[ExitDecision]]


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    lookup: Lookup
    decision: asyncio.Future[ExitDecision]
    since: float


class LookupBatcher:
    """Decides look-ups through `decide`, called with 1..MAX_BATCH of them on a thread of its own.

    While a batch is being decided the look-ups that arrive collect into the next one, so batches
    grow with load and a lone prompt never waits for company. A look-up that fails or is late
    becomes a decision for full depth: nothing is raised into a request.

    observe_wait: told the seconds that each look-up waited for its batch.
    thread: of another batcher whose `decide` must not run beside this one's.
    """

    def __init__(
        self,
        decide: Decide,
        *,
        num_layers: int,
        timeout_s: float,
        observe_wait: Callable[[float], None] = lambda _: None,
        thread: DaemonThread | None = None,
    ) -> None:
        self._decide = decide
        self._observe_wait = observe_wait
        self._num_layers = num_layers
        self._timeout_s = timeout_s
        self._waiting: deque[_Waiting] = deque()
        self._thread = thread or DaemonThread("raee-lookup")
        self._worker: asyncio.Task[None] | None = None
        self._logged: set[str] = set()

    async def decide(self, lookups: Sequence[Lookup]) -> list[ExitDecision]:
        """One decision per look-up, within the time-out. `lookup_ms` is what the request waited."""
        if not lookups:
            return []
        start = time.perf_counter()
        loop = asyncio.get_running_loop()
        entries = [_Waiting(lookup, loop.create_future(), start) for lookup in lookups]
        self._waiting.extend(entries)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._run())
        try:
            await asyncio.wait([e.decision for e in entries], timeout=self._timeout_s)
            lookup_ms = (time.perf_counter() - start) * 1000
            return [self._outcome(entry, lookup_ms) for entry in entries]
        finally:
            late = [entry.decision.cancel() for entry in entries]
            if any(late):  # or the client is gone: not worth encoding any more
                self._waiting = deque(e for e in self._waiting if not e.decision.done())

    def successor(self, decide: Decide) -> LookupBatcher:
        """One that decides otherwise, on the same thread; this one finishes what it has begun."""
        return LookupBatcher(
            decide,
            num_layers=self._num_layers,
            timeout_s=self._timeout_s,
            observe_wait=self._observe_wait,
            thread=self._thread,
        )

    def keep_to(self, cores: Collection[int]) -> None:
        """Decide on these cores only, from the next batch on."""
        self._thread.submit(os.sched_setaffinity, 0, cores)  # 0: the thread that calls it

    def close(self) -> None:
        """Let the thread end; a batch that hangs is left behind."""
        self._thread.close(CLOSE_TIMEOUT_S)

    def _outcome(self, entry: _Waiting, lookup_ms: float) -> ExitDecision:
        if entry.decision.done():
            return replace(entry.decision.result(), lookup_ms=lookup_ms)
        return self._full(Reason.TIMEOUT, entry.lookup, lookup_ms)

    async def _run(self) -> None:
        while batch := self._next_batch():
            for entry, decision in zip(batch, await self._decided(batch), strict=True):
                if not entry.decision.done():
                    entry.decision.set_result(decision)

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < MAX_BATCH:
            entry = self._waiting.popleft()
            if not entry.decision.done():
                batch.append(entry)
        return batch

    async def _decided(self, batch: list[_Waiting]) -> list[ExitDecision]:
        lookups = [entry.lookup for entry in batch]
        for entry in batch:
            self._observe_wait(time.perf_counter() - entry.since)
        loop = asyncio.get_running_loop()
        try:
            decisions = await loop.run_in_executor(self._thread, self._decide, lookups)
            if len(decisions) != len(lookups):
                raise RuntimeError(f"{len(decisions)} decisions for {len(lookups)} look-ups")
            return decisions
        except Exception as error:  # any failure of encoder or table means full depth
            self._log_once(error)
            return [self._full(Reason.ERROR, lookup, 0.0) for lookup in lookups]

    def _log_once(self, error: Exception) -> None:
        kind = type(error).__name__
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error(
                "Look-up failed; such prompts run at full depth. Further failures of kind %s "
                "are only counted.",
                kind,
                exc_info=error,
            )

    def _full(self, reason: Reason, lookup: Lookup, lookup_ms: float) -> ExitDecision:
        return ExitDecision.full(self._num_layers, reason, task=lookup.task, lookup_ms=lookup_ms)
