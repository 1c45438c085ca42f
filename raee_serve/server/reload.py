"""Taking up a new version of the exit table while requests are served.

A gate is replaced whole, and never changed: a request that has met the old one finishes with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raee_serve.errors import RaeeError

if TYPE_CHECKING:
    from raee_serve.server.gate import Gate

logger = logging.getLogger(__name__)


class ReloadError(RaeeError):
    """The table as it is now is of no use. The message holds no paths and goes to clients."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is loaded of a table. state: another one for every other content; rows: by task."""

    version: int
    state: str
    rows: Mapping[str, int]


class TableReloader:
    """Knows the gate in use, and replaces it by one of the table as it is now.

    load: makes of a gate one that decides by the table as it is now. It takes its time, on a
        thread of its own, and may raise anything.
    newest_state: of the table, as `Snapshot.state`; likewise.
    uri: of the table, which errors that reach clients do not name.
    """

    gate: Gate

    def __init__(
        self, load: Callable[[Gate], Gate], newest_state: Callable[[], str], uri: str
    ) -> None:
        self._load = load
        self._newest_state = newest_state
        self._uri = uri
        self._one_at_a_time = asyncio.Lock()

    def start(self, gate: Gate) -> Gate:
        """The first gate, which from now on may be replaced."""
        self._use(replace(gate, reloader=self))
        return self.gate

    async def reload(self) -> tuple[Snapshot, Snapshot]:
        """(what was loaded, what is now). Raises ReloadError, and all stays as it was."""
        async with self._one_at_a_time:
            old, metrics = self._snapshot(), self.gate.metrics
            try:
                gate = await asyncio.to_thread(self._load, self.gate)
                await gate.probes.load(gate.probe_set)
            except Exception as error:
                metrics.reloaded("kept")
                logger.exception("Exit table unusable; version %d stays loaded.", old.version)
                why = _reason(error, self._uri)
                raise ReloadError(f"version {old.version} stays loaded: {why}") from error
            self._use(gate)  # at once: from here on the workers may forget the old probes
            metrics.reloaded("loaded")
            return old, self._snapshot()

    async def watch(self, seconds: float) -> None:
        """Reload whenever the table has changed, looking every so often. Never returns.

        What is unusable is tried again when it has changed again.
        """
        tried = None
        while True:
            await asyncio.sleep(seconds)
            newest = await asyncio.to_thread(self._newest)
            if newest in (tried, self._snapshot().state):
                continue
            tried = newest
            try:
                await self.reload()
            except ReloadError:
                continue  # said and counted

    def _use(self, gate: Gate) -> None:
        self.gate = gate
        snapshot = self._snapshot()
        gate.metrics.table(snapshot.version, snapshot.rows)

    def _snapshot(self) -> Snapshot:
        snapshot = self.gate.snapshot
        assert snapshot is not None, "the gate in use is not of a table"
        return snapshot

    def _newest(self) -> str:
        """The table's state; of one that cannot even be opened, what is wrong with it."""
        try:
            return self._newest_state()
        except Exception as error:
            return str(error)


def _reason(error: BaseException, uri: str) -> str:
    """What a client may know: our own words without the table's place, and no library's."""
    link: BaseException | None = error
    while link is not None:
        if not isinstance(link, RaeeError):
            return "the exit table is missing or damaged; the server's log says more"
        link = link.__cause__
    return str(error).replace(f"exit table {uri}", "the exit table").replace(uri, "it")
