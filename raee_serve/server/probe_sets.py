"""The probe sets that the engine's workers hold: the current one, and older ones still in use."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raee_serve.errors import RaeeError

if TYPE_CHECKING:
    from raee_serve.retrieval.retriever import ProbeSet

logger = logging.getLogger(__name__)

Call = Callable[..., Awaitable[Any]]
"""`EngineClient.collective_rpc`: (method, args=...) on all workers of all engines."""


class ProbeSets:
    """Loads a table's probes into the workers before anything is decided by them.

    A request that was admitted while a set was current keeps it to its end. A set is unloaded when
    it is no longer current and the last of its requests is over.
    """

    def __init__(self) -> None:
        self._call: Call | None = None
        self._current = ""
        self._held: set[str] = set()
        self._requests: Counter[str] = Counter()
        self._one_at_a_time = asyncio.Lock()
        self._unloading: set[asyncio.Task[None]] = set()

    async def connect(self, call: Call, probe_set: ProbeSet | None) -> None:
        """The engine is there: have it hold the set to begin with. Raises RaeeError."""
        self._call = call
        await self.load(probe_set)

    async def load(self, probe_set: ProbeSet | None) -> None:
        """Make a set current, once all workers hold it; nothing is to do without an engine.

        Raises RaeeError where the workers cannot load it. The current set then stays.
        """
        if self._call is None:
            return
        if probe_set is not None:
            await self._hold(probe_set)
        self._current = "" if probe_set is None else probe_set.id
        self._unload_idle()

    async def _hold(self, probe_set: ProbeSet) -> None:
        async with self._one_at_a_time:
            if probe_set.id in self._held:
                return
            try:
                assert self._call is not None
                await self._call("load_probes", args=(probe_set.id, probe_set.packed))
            except Exception as error:
                logger.exception("The workers cannot load the probe set %s.", probe_set.id)
                raise RaeeError(f"the engine cannot load the table's probes: {error}") from None
            self._held.add(probe_set.id)

    @contextmanager
    def in_use(self, set_id: str) -> Iterator[None]:
        """Within it the set stays loaded."""
        self._requests[set_id] += 1
        try:
            yield
        finally:
            self._requests[set_id] -= 1
            if not self._requests[set_id]:
                del self._requests[set_id]
                self._unload_idle()

    def _unload_idle(self) -> None:
        if all(map(self._is_needed, self._held)):
            return
        task = asyncio.get_running_loop().create_task(self._unload())
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _unload(self) -> None:
        async with self._one_at_a_time:
            idle = [set_id for set_id in self._held if not self._is_needed(set_id)]
            for set_id in idle:
                self._held.remove(set_id)  # first: what fails is loaded anew when it is needed
                try:
                    assert self._call is not None
                    await self._call("unload_probes", args=(set_id,))
                except Exception:
                    logger.exception("The probe set %s stays in the workers' memory.", set_id)

    def _is_needed(self, set_id: str) -> bool:
        return set_id == self._current or self._requests[set_id] > 0
