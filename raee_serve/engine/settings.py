"""What the extension asks of vLLM, and how a request says its exit layer."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from raee_serve.engine.segments import AUTO, parse_count
from raee_serve.errors import RaeeError
from raee_serve.exit_points import checked_points, even_points
from raee_serve.records import EXIT_HEADS, ExitHead
from raee_serve.shortcuts import Shortcuts

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

OFF_VARIABLE = "RAEE_OFF"
"""Kill switch: set to 1, everything is vanilla vLLM: its own models, scheduler and worker."""

RESERVED_PREFIX = "raee_"
"""Keys of `SamplingParams.extra_args` that are ours alone; clients reach it by `vllm_xargs`."""
EXIT_LAYER_KEY = "raee_exit_layer"
"""The one under which a request's exit layer travels (an int)."""
EXIT_HEAD_KEY = "raee_exit_head"
"""The same for its exit head, an `ExitHead`; without it the head is plain."""
PROBE_KEY = "raee_probe"
"""The probe of a request whose exit head is "probe": [id of the probe set, name of the probe]."""
PROBE_BIAS_KEY = "raee_probe_bias"
"""What is added to the scores of its probe: a float for each label. -1e9 excludes a label."""

NO_LABEL = 0
"""The token id that a request by probe answers with when it has no answer: the workers do not hold
its probe, its bias is of another length, or the scores are not numbers."""
FIRST_LABEL = 1
"""The token id that it answers with for the first label of its task; the others follow."""

SCHEDULER_CLS = "raee_serve.engine.scheduler.truncating_scheduler"
CPU_WORKER_CLS = "raee_serve.engine.worker.TruncatingCPUWorker"
GPU_WORKER_CLS = "raee_serve.engine.gpu_worker.TruncatingGPUWorker"
WORKERS = (CPU_WORKER_CLS, GPU_WORKER_CLS)
RESTING_EXECUTOR = "raee_serve.engine.executor.RestingExecutor"
"""For `distributed_executor_backend`: what engines on a CPU take instead of vLLM's "mp"."""

KV_SEGMENTS_KEY = "raee_kv_segments"
"""Key of vLLM's `additional_config`: depth segments of the KV cache, a number or "auto"."""
SHORTCUTS_KEY = "raee_shortcuts"
"""Another: path of the exit shortcuts' file."""
EXIT_POINTS_KEY = "raee_exit_points"
"""Another: the layers between which CUDA graphs are captured, a list."""


def engine_options(
    kv_segments: int | Literal["auto"] = AUTO,
    shortcuts: str | Path | None = None,
    exit_points: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Engine arguments that switch truncated execution on, for `vllm.LLM(model, **options)`.

    kv_segments: a request holds KV blocks only for those segments of layers that it reaches;
        "auto" takes their number from the model. 1 leaves vLLM's cache as it is.
        Raises `ValueError` for anything else.
    shortcuts: file of `raee-serve shortcuts fit`, for requests whose exit head is "shortcut".
    exit_points: layers after which requests leave steps that run as CUDA graphs; other exits are
        exact too, but without graphs. None for some at equal distances. On CPU without effect.

    The named classes are imported by vLLM itself, so an installation that cannot load them
    stops the engine instead of serving vanilla vLLM (invariant 6 of docs/architecture.md).
    On CPU compilation is off: there it gains nothing and adds a minute to every start. An engine
    core there sleeps while its workers compute, unless VLLM_ENABLE_V1_MULTIPROCESSING=0 has it
    compute itself.

    With RAEE_OFF=1 the engine is vLLM's own, and exit layers have no effect.
    """
    options: dict[str, Any] = {} if on_cuda() else {"enforce_eager": True}
    if is_off():
        return options
    options["scheduler_cls"] = SCHEDULER_CLS
    options["worker_cls"] = GPU_WORKER_CLS if on_cuda() else CPU_WORKER_CLS
    if not on_cuda() and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "1":
        options["distributed_executor_backend"] = RESTING_EXECUTOR
    additional: dict[str, Any] = {}
    if (count := parse_count(kv_segments)) != AUTO:
        additional[KV_SEGMENTS_KEY] = count
    if shortcuts is not None:
        additional[SHORTCUTS_KEY] = str(Path(shortcuts).absolute())
    if exit_points is not None:
        additional[EXIT_POINTS_KEY] = list(exit_points)
    return options | ({"additional_config": additional} if additional else {})


def on_cuda() -> bool:
    """Whether engines run on CUDA: by what torch was built for, since asking a device opens it."""
    return torch.version.cuda is not None


def kv_segments(additional_config: Mapping[str, Any]) -> int | Literal["auto"]:
    """The depth segments asked for in vLLM's `additional_config`; "auto" when it names none."""
    return parse_count(additional_config.get(KV_SEGMENTS_KEY, AUTO))


def exit_points(additional_config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The exit points asked for in vLLM's `additional_config`, full depth among them; some at
    equal distances when it names none. Raises RaeeError for a layer the model does not have.
    """
    points = additional_config.get(EXIT_POINTS_KEY)
    return even_points(num_layers) if points is None else checked_points(points, num_layers)


def shortcuts_of(additional_config: Mapping[str, Any]) -> Shortcuts | None:
    """The exit shortcuts that vLLM's `additional_config` names. Raises TableError."""
    path = additional_config.get(SHORTCUTS_KEY)
    return None if path is None else Shortcuts.load(Path(path))


def exit_args(exit_layer: int, head: ExitHead = "plain") -> dict[str, Any]:
    """`extra_args` of a `SamplingParams` whose request runs `exit_layer` decoder layers and leaves
    through `head`.

    Raises `ValueError` unless `exit_layer` is an int of at least 1 and `head` one of `EXIT_HEADS`.
    The model's layer count and the layers that have shortcuts are checked where they are known
    (`Exits.of`).
    """
    if isinstance(exit_layer, bool) or not isinstance(exit_layer, int) or exit_layer < 1:
        raise ValueError(f"exit layer is {exit_layer!r}; allowed: an integer of at least 1")
    if head not in EXIT_HEADS:
        raise ValueError(f"exit head is {head!r}; allowed: {', '.join(EXIT_HEADS)}")
    return {EXIT_LAYER_KEY: exit_layer} | ({} if head == "plain" else {EXIT_HEAD_KEY: head})


def probe_args(exit_layer: int, set_id: str, name: str, bias: Sequence[float]) -> dict[str, Any]:
    """`extra_args` of a `SamplingParams` whose request leaves after `exit_layer` layers through the
    probe `name` of the set `set_id`.

    bias: what is added to the scores, a float for each of the probe's labels.
    Its first token says the label, see `label_of`: `max_tokens` has to be 1. What works by token id
    (penalties, `logit_bias`, `allowed_token_ids`, `min_tokens`) has no meaning beside it.
    Raises `ValueError` unless `exit_layer` is an int of at least 1.
    """
    return exit_args(exit_layer) | {
        EXIT_HEAD_KEY: "probe",
        PROBE_KEY: [set_id, name],
        PROBE_BIAS_KEY: [float(number) for number in bias],
    }


def label_of(token_id: int) -> int | None:
    """The label, by its place in the task, that a token of a request by probe stands for.

    None for `NO_LABEL`.
    """
    return token_id - FIRST_LABEL if token_id >= FIRST_LABEL else None


def is_exit_layer(value: object, num_layers: int) -> bool:
    """Whether `value` is an exit layer of a model with `num_layers` layers."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= num_layers


def at_exit(params: SamplingParams, exit_layer: int, head: ExitHead) -> SamplingParams:
    """A copy of `params` with this exit, which is not by probe. Raises as `exit_args`."""
    return with_own_args(params, exit_args(exit_layer, head))


def with_own_args(params: SamplingParams, own_args: Mapping[str, Any]) -> SamplingParams:
    """A copy of `params` with an `extra_args` dict of its own, whose keys of ours are `own_args`.

    The prompts of one body share one `extra_args` dict, and `SamplingParams.clone` is shallow.
    """
    own = copy.copy(params)
    given = (params.extra_args or {}).items()
    kept = {key: value for key, value in given if not key.startswith(RESERVED_PREFIX)}
    own.extra_args = kept | dict(own_args)
    return own


def own_args(params: SamplingParams) -> dict[str, Any]:
    """The `extra_args` of `params` whose keys are ours."""
    given = (params.extra_args or {}).items()
    return {key: value for key, value in given if key.startswith(RESERVED_PREFIX)}


def is_off() -> bool:
    """Whether the kill switch is set. Raises RaeeError for a value that is neither 0 nor 1."""
    value = os.environ.get(OFF_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise RaeeError(f"{OFF_VARIABLE} is {value!r}; allowed: 0 or 1")
    return value == "1"
