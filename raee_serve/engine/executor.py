"""Executor for engines on CPUs, whose core process shares its cores with everything but workers."""

from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from raee_serve_patches.resting_core import SEAM, rest_while_waiting


class RestingExecutor(MultiprocExecutor):
    """vLLM's executor of worker processes, with an engine core that sleeps while they compute.

    vLLM's asks again and again whether a step is done, and so takes half a core from look-ups and
    the API server where there is one core for all of them.
    """

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        SEAM.check()
        done = super().initialize_from_config(*args, **kwargs)
        rest_while_waiting(self)  # not sooner: by now the workers' wake-up calls are heard
        return done
