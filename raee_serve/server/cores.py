"""Which cores the engine's workers leave to look-ups."""

from __future__ import annotations

import os
from typing import Any

from vllm.platforms import current_platform
from vllm.utils.ompmultiprocessing import OMPProcessManager

from raee_serve.engine.settings import RESTING_EXECUTOR

BINDING = ("mp", RESTING_EXECUTOR)
"""Executors whose worker processes vLLM binds to cores."""


def spare_cores(vllm_config: Any) -> frozenset[int]:
    """Cores of this process that no worker is bound to; empty if unknown or if there are none.

    Known on CPUs, for one engine whose worker processes vLLM binds (VLLM_CPU_OMP_THREADS_BIND).
    """
    parallel = vllm_config.parallel_config
    bound = current_platform.is_cpu() and parallel.distributed_executor_backend in BINDING
    if not bound or parallel.data_parallel_size > 1:
        return frozenset()
    plan = OMPProcessManager(vllm_config)
    if plan.auto_setup:  # not their hyper-threads' siblings, which are nobody's either
        return frozenset(plan.reserved_cpu_list)
    owned = {core for cores in plan.cpu_lists for core in cores}
    return frozenset(os.sched_getaffinity(0)) - owned if owned else frozenset()
