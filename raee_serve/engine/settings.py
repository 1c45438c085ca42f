"""What the extension asks of vLLM, and how a request says its exit layer."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from raee_serve.engine.segments import parse_count
from raee_serve.errors import RaeeError

OFF_VARIABLE = "RAEE_OFF"
"""Kill switch: set to 1, everything is vanilla vLLM: its own models, scheduler and worker."""

EXIT_LAYER_KEY = "raee_exit_layer"
"""Key of `SamplingParams.extra_args` under which a request's exit layer travels (an int)."""

SCHEDULER_CLS = "raee_serve.engine.scheduler.truncating_scheduler"
WORKER_CLS = "raee_serve.engine.worker.TruncatingCPUWorker"


KV_SEGMENTS_KEY = "raee_kv_segments"
"""Key of vLLM's `additional_config`: depth segments of the KV cache, a number or "auto"."""


def engine_options(kv_segments: int | Literal["auto"] = 1) -> dict[str, Any]:
    """Engine arguments that switch truncated execution on, for `vllm.LLM(model, **options)`.

    kv_segments: above 1, a request holds KV blocks only for the segments of layers that it
        reaches; "auto" takes the number from the model. 1 leaves vLLM's cache as it is.
        Raises `ValueError` for anything else.

    The named classes are imported by vLLM itself, so an installation that cannot load them
    stops the engine instead of serving vanilla vLLM (invariant 6 of docs/architecture.md).
    Compilation is off: it gains nothing on CPU and adds a minute to every start.

    With RAEE_OFF=1 the engine is vLLM's own, and exit layers have no effect.
    """
    if is_off():
        return {"enforce_eager": True}
    options: dict[str, Any] = {
        "scheduler_cls": SCHEDULER_CLS,
        "worker_cls": WORKER_CLS,
        "enforce_eager": True,
    }
    if (count := parse_count(kv_segments)) != 1:
        options["additional_config"] = {KV_SEGMENTS_KEY: count}
    return options


def kv_segments(additional_config: Mapping[str, Any]) -> int | Literal["auto"]:
    """The depth segments asked for in vLLM's `additional_config`; 1 when it names none."""
    return parse_count(additional_config.get(KV_SEGMENTS_KEY, 1))


def exit_args(exit_layer: int) -> dict[str, int]:
    """`extra_args` of a `SamplingParams` whose request runs `exit_layer` decoder layers.

    Raises `ValueError` unless `exit_layer` is an int of at least 1. The upper end, the
    model's layer count, is checked where the model is known (`exit_layer_of`).
    """
    if isinstance(exit_layer, bool) or not isinstance(exit_layer, int) or exit_layer < 1:
        raise ValueError(f"exit layer is {exit_layer!r}; allowed: an integer of at least 1")
    return {EXIT_LAYER_KEY: exit_layer}


def is_off() -> bool:
    """Whether the kill switch is set. Raises RaeeError for a value that is neither 0 nor 1."""
    value = os.environ.get(OFF_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise RaeeError(f"{OFF_VARIABLE} is {value!r}; allowed: 0 or 1")
    return value == "1"
