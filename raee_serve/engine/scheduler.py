"""Scheduler that carries each scheduled request's exit layer to the worker."""

from dataclasses import dataclass, field, fields
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from raee_serve.engine.compat import check_engine
from raee_serve.engine.kv_cache import is_split
from raee_serve.engine.settings import (
    EXIT_HEAD_KEY,
    EXIT_LAYER_KEY,
    is_exit_layer,
    own_args,
    shortcuts_of,
    with_own_args,
)
from raee_serve.records import ExitHead
from raee_serve_patches.depth_kv_cache import bring_kv_cache_manager
from raee_serve_patches.request_salt import salt_block_hashes

logger = init_logger(f"vllm.{__name__}")


@dataclass
class TruncatedSchedulerOutput(SchedulerOutput):
    """A scheduled step with its layer-truncation mask.

    exit_layers: request id to exit layer (1..num_layers) for every request scheduled in this
    step; the mask is `layer < exit_layer` for each layer of each request.
    shortcuts: ids of those among them that leave through the shortcut of their exit layer.
    """

    exit_layers: dict[str, int] = field(default_factory=dict)
    shortcuts: frozenset[str] = frozenset()


class TruncatingScheduler(Scheduler):
    """vLLM's scheduler, plus: states exits, and keeps depths apart in the prefix cache.

    The latter by hashes that depths do not share or, when the KV cache is one of depth segments,
    by a KV cache manager that knows how deep a block was filled.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        shortcuts = shortcuts_of(vllm_config.additional_config)
        self.exits = Exits(
            vllm_config.model_config.get_total_num_hidden_layers(),
            frozenset(shortcuts.layers if shortcuts else ()),
        )
        self.kv_by_depth = is_split(self.kv_cache_config)
        if self.kv_by_depth:
            bring_kv_cache_manager(self, self.exits.layer_of)

    def add_request(self, request: Request) -> None:
        if (session := self.requests.get(request.request_id)) is not None:
            # A later chunk of a streamed input, which reads keys and values of those before it.
            args = own_args(session.sampling_params)
            request.sampling_params = with_own_args(request.sampling_params, args)
        elif not self.kv_by_depth:
            # Not the head, which comes after the last layer: keys and values do not depend on it.
            salt_block_hashes(request, self.exits.layer_of(request), self.exits.num_layers)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> TruncatedSchedulerOutput:
        output = super().schedule(throttle_prefills)
        exits = {r: self.exits.of(self.requests[r]) for r in output.num_scheduled_tokens}
        inherited = {f.name: getattr(output, f.name) for f in fields(SchedulerOutput)}
        return TruncatedSchedulerOutput(
            **inherited,
            exit_layers={request_id: layer for request_id, (layer, _) in exits.items()},
            shortcuts=frozenset(r for r, (_, head) in exits.items() if head == "shortcut"),
        )


class TruncatingAsyncScheduler(TruncatingScheduler, AsyncScheduler):
    """The same over vLLM's scheduler that plans a step while the one before it runs."""


def truncating_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> TruncatingScheduler:
    """The scheduler for a resolved configuration; vLLM calls it as it would call a class.

    Whether scheduling is asynchronous is known only now, after the platform has had its say.
    """
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler_cls = TruncatingAsyncScheduler if is_async else TruncatingScheduler
    return scheduler_cls(vllm_config, *args, **kwargs)


@dataclass(frozen=True)
class Exits:
    """What exits an engine has: layers 1..num_layers, with shortcuts at some before the last."""

    num_layers: int
    shortcut_layers: frozenset[int] = frozenset()

    def layer_of(self, request: Request) -> int:
        """The exit layer a request asks for."""
        return self.of(request)[0]

    def of(self, request: Request) -> tuple[int, ExitHead]:
        """The exit a request asks for; full depth when it asks for none.

        An unusable one also means full depth, with a warning: it is past the front end that could
        have refused it, and an error here would stop the engine for everybody.
        """
        params = request.sampling_params
        extra_args = (params.extra_args if params is not None else None) or {}
        layer = extra_args.get(EXIT_LAYER_KEY, self.num_layers)
        head = extra_args.get(EXIT_HEAD_KEY, "plain")
        if is_exit_layer(layer, self.num_layers):
            is_shortcut = head == "shortcut" and layer in self.shortcut_layers
            if is_shortcut or head in ("plain", "probe"):
                return layer, head
            logger.warning_once(
                "exit head %s at layer %d is neither 'plain' nor 'probe' nor 'shortcut' at one of "
                "the layers %s: such requests run at full depth",
                repr(head),  # arguments are to be hashable
                layer,
                str(sorted(self.shortcut_layers)),
            )
        else:
            logger.warning_once(
                "exit layer %s is not an integer in 1..%d: such requests run at full depth",
                repr(layer),
                self.num_layers,
            )
        return self.num_layers, "plain"
