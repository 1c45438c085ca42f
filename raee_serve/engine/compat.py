"""Start-up checks: what truncated execution cannot run with, refused by name."""

from typing import Any

import vllm
from vllm.config import CompilationMode
from vllm.platforms import current_platform

from raee_serve.engine.settings import SCHEDULER_CLS, WORKER_CLS
from raee_serve_patches import check_seams

SUPPORTED_VLLM = "0.32."

DRAFTERS = ("ngram",)
"""Speculative methods that draft from tokens alone, so that depth does not matter to them."""


class UnsupportedError(RuntimeError):
    """The engine's configuration holds something truncated execution does not support."""


def check_engine(config: Any) -> None:
    """Raise `UnsupportedError` naming everything in a `VllmConfig` that cannot work.

    Also raises `raee_serve_patches.SeamError` when the installed vLLM differs from the one
    the seams were written against.
    """
    if not vllm.__version__.startswith(SUPPORTED_VLLM):
        raise UnsupportedError(
            f"raee-serve runs on vLLM {SUPPORTED_VLLM}*; installed is {vllm.__version__}"
        )
    check_seams()
    problems = [reason for refused, reason in _checks(config) if refused]
    if problems:
        raise UnsupportedError("raee-serve cannot run with: " + "; ".join(problems))


def _checks(config: Any) -> list[tuple[bool, str]]:
    """(refused, why) for each feature that is not supported yet."""
    parallel, scheduler = config.parallel_config, config.scheduler_config
    speculative = config.speculative_config
    return [
        (
            parallel.worker_cls != WORKER_CLS or scheduler.scheduler_cls != SCHEDULER_CLS,
            "a worker or scheduler class other than "
            f"{WORKER_CLS} and {SCHEDULER_CLS}; they work only together",
        ),
        (
            not current_platform.is_cpu(),
            f"platform {current_platform.device_name}; only the CPU back end is supported",
        ),
        (
            config.use_v2_model_runner,
            "model runner V2 on CPU; set VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        (
            config.compilation_config.mode not in (None, CompilationMode.NONE),
            "torch.compile; pass --enforce-eager",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            f"pipeline parallel size {parallel.pipeline_parallel_size}; allowed: 1",
        ),
        (parallel.enable_dbo, "dual batch overlap (--enable-dbo)"),
        (
            speculative is not None and speculative.method not in DRAFTERS,
            f"speculative decoding by {speculative and speculative.method!r}, which drafts from "
            f"the hidden states of the last layer; allowed: {', '.join(DRAFTERS)}",
        ),
        (
            config.kv_transfer_config is not None,
            "KV connectors (--kv-transfer-config), which expect keys and values of every layer",
        ),
        (
            config.cache_config.kv_sharing_fast_prefill,
            "--kv-sharing-fast-prefill",
        ),
        (
            config.model_config.runner_type != "generate",
            f"runner type {config.model_config.runner_type!r}; allowed: 'generate'",
        ),
    ]
