"""Seam: let an engine core sleep while its workers run a step.

Upstream: `MultiprocExecutor.response_mqs`, and of each `MessageQueue` its `_spin_condition`, whose
`busy_loop_s` says how long after the last message its reader asks for the next one without rest;
after that a call through a socket, which is made for every message, wakes it. Such calls get lost
now and then (the socket drops what it has no room for), so none is waited for long: how long goes
by `last_read`, when the last message was read.
Checked on: vLLM 0.32.0, CPU.
Why no extension point serves: the time is a default argument that nothing passes.
Retired by: a setting for it.
"""

import time
from typing import Any

from raee_serve_patches.seam import Seam

_QUEUE = "vllm.distributed.device_communicators.shm_broadcast"

SEAM = Seam(
    "resting_core",
    {
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor._init_executor": "ccb1b6dad82b",
        f"{_QUEUE}:SpinCondition": "54573817ad9b",
        f"{_QUEUE}:MessageQueue.acquire_read": "08048c325922",
        f"{_QUEUE}:MessageQueue.enqueue": "57f1032296f8",
    },
)


SHORTEST_REST_MS = 1
"""A step takes ten times as long or more."""
REST = 0.1
"""How long to rest, as a share of the time that the answer has taken so far: every look at what is
not there yet takes time from a worker that computes on the same core."""


def rest_while_waiting(executor: Any) -> None:
    """From now on wait for the executor's workers asleep."""
    for queue in executor.response_mqs:
        condition = queue._spin_condition
        condition.busy_loop_s = 0
        condition.wait = Rests(condition).wait


class Rests:
    """The reader's waits for one message after the other."""

    def __init__(self, condition: Any) -> None:
        self._condition = condition
        self._wait = condition.wait
        self._last_read: float | None = None  # before the first wait
        self._since = 0.0

    def wait(self, timeout_ms: int | None = None) -> None:
        """As `SpinCondition.wait`, of a reader that looks for itself after a while."""
        now = time.monotonic()
        if self._condition.last_read != self._last_read:
            self._last_read, self._since = self._condition.last_read, now
        rest_ms = max(SHORTEST_REST_MS, int(1000 * REST * (now - self._since)))
        self._wait(rest_ms if timeout_ms is None else min(timeout_ms, rest_ms))
