"""Scheduler that carries each scheduled request's exit layer to the worker."""

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from raee_serve.engine.compat import check_engine
from raee_serve.engine.kv_cache import is_split
from raee_serve.engine.settings import EXIT_LAYER_KEY
from raee_serve_patches.depth_kv_cache import bring_kv_cache_manager
from raee_serve_patches.request_salt import salt_block_hashes

logger = init_logger(f"vllm.{__name__}")


@dataclass
class TruncatedSchedulerOutput(SchedulerOutput):
    """A scheduled step with its layer-truncation mask.

    exit_layers: request id to exit layer (1..num_layers) for every request scheduled in this
    step; the mask is `layer < exit_layer` for each layer of each request.
    """

    exit_layers: dict[str, int] = field(default_factory=dict)


class TruncatingScheduler(Scheduler):
    """vLLM's scheduler, plus: states exits, and keeps depths apart in the prefix cache.

    The latter by hashes that depths do not share or, when the KV cache is one of depth segments,
    by a KV cache manager that knows how deep a block was filled.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        self.num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        self.kv_by_depth = is_split(self.kv_cache_config)
        if self.kv_by_depth:
            bring_kv_cache_manager(self, partial(exit_layer_of, num_layers=self.num_layers))

    def add_request(self, request: Request) -> None:
        if not self.kv_by_depth:
            exit_layer = exit_layer_of(request, self.num_layers)
            salt_block_hashes(request, exit_layer, self.num_layers)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> TruncatedSchedulerOutput:
        output = super().schedule(throttle_prefills)
        exit_layers = {
            request_id: exit_layer_of(self.requests[request_id], self.num_layers)
            for request_id in output.num_scheduled_tokens
        }
        inherited = {f.name: getattr(output, f.name) for f in fields(SchedulerOutput)}
        return TruncatedSchedulerOutput(**inherited, exit_layers=exit_layers)


class TruncatingAsyncScheduler(TruncatingScheduler, AsyncScheduler):
    """The same over vLLM's scheduler that plans a step while the one before it runs."""


def truncating_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> TruncatingScheduler:
    """The scheduler for a resolved configuration; vLLM calls it as it would call a class.

    Whether scheduling is asynchronous is known only now, after the platform has had its say.
    """
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler_cls = TruncatingAsyncScheduler if is_async else TruncatingScheduler
    return scheduler_cls(vllm_config, *args, **kwargs)


def exit_layer_of(request: Request, num_layers: int) -> int:
    """The exit layer a request asks for; `num_layers` when it asks for none.

    An unusable value also means full depth, with a warning: it is past the front end that
    could have refused it, and an error here would stop the engine for everybody.
    """
    params = request.sampling_params
    extra_args = params.extra_args if params is not None else None
    if not extra_args or EXIT_LAYER_KEY not in extra_args:
        return num_layers
    value = extra_args[EXIT_LAYER_KEY]
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= num_layers:
        return value
    logger.warning_once(
        "exit layer %r is not an integer in 1..%d: such requests run at full depth",
        value,
        num_layers,
    )
    return num_layers
