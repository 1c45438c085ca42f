"""Seam: let an engine core sleep while its workers run a step.

Upstream: `MultiprocExecutor.response_mqs`, and of each `MessageQueue` its `_spin_condition`, whose
`busy_loop_s` says how long after the last message its reader asks for the next one without rest;
after that a call through a socket, which is made for every message, wakes it. Such calls get lost
now and then (the socket drops what it has no room for), so none is waited for long.
Checked on: vLLM 0.32.0, CPU.
Why no extension point serves: the time is a default argument that nothing passes.
Retired by: a setting for it.
"""

from collections.abc import Callable
from functools import partial
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


LONGEST_REST_MS = 1
"""A step takes ten times as long or more."""


def rest_while_waiting(executor: Any) -> None:
    """From now on wait for the executor's workers asleep."""
    for queue in executor.response_mqs:
        condition = queue._spin_condition
        condition.busy_loop_s = 0
        condition.wait = partial(_wait, condition.wait)


def _wait(wait: Callable[[int], None], timeout_ms: int | None = None) -> None:
    wait(LONGEST_REST_MS if timeout_ms is None else min(timeout_ms, LONGEST_REST_MS))
