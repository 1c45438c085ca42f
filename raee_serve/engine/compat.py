"""Start-up checks: what truncated execution cannot run with, refused by name."""

from typing import Any

import vllm
from vllm.config import CompilationMode, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from raee_serve.engine.settings import CPU_WORKER_CLS, GPU_WORKER_CLS, SCHEDULER_CLS
from raee_serve_patches import check_seams

SUPPORTED_VLLM = "0.32."

DRAFTERS = ("ngram",)
"""Speculative methods that draft from tokens alone, so that depth does not matter to them."""

ATTENTION = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")
"""Attention back ends of model runner V2 whose metadata can be made anew for each stage of a step:
on the device all they keep is written in turn. FlashInfer also keeps plans in host memory, which
the next stage's would overwrite while the device has yet to read them."""


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
    check_seams(2 if config.use_v2_model_runner else 1)
    checks = _checks(config) + (_v2_checks(config) if config.use_v2_model_runner else [])
    problems = [reason for refused, reason in checks if refused]
    if problems:
        raise UnsupportedError("raee-serve cannot run with: " + "; ".join(problems))


def check_attention(config: Any) -> None:
    """Raise `UnsupportedError` for a loaded model's attention back end that V2 cannot run stages
    with.
    """
    layers = get_layers_from_vllm_config(config, Attention).values()
    found = {layer.get_attn_backend().get_name() for layer in layers}
    if refused := sorted(found - set(ATTENTION)):
        raise UnsupportedError(
            f"raee-serve cannot run with attention back end {', '.join(refused)}; allowed: "
            f"{', '.join(ATTENTION)} (--attention-backend)"
        )


def _checks(config: Any) -> list[tuple[bool, str]]:
    """(refused, why) for each feature that is not supported yet."""
    parallel, scheduler = config.parallel_config, config.scheduler_config
    speculative = config.speculative_config
    on_cuda, on_cpu = current_platform.is_cuda(), current_platform.is_cpu()
    worker = GPU_WORKER_CLS if on_cuda else CPU_WORKER_CLS
    return [
        (
            parallel.worker_cls != worker or scheduler.scheduler_cls != SCHEDULER_CLS,
            "a worker or scheduler class other than "
            f"{worker} and {SCHEDULER_CLS}; they work only together",
        ),
        (
            not (on_cuda or on_cpu),
            f"platform {current_platform.device_name}; allowed: cpu, cuda",
        ),
        (
            on_cuda and not config.use_v2_model_runner,
            "model runner V1 on CUDA; set VLLM_USE_V2_MODEL_RUNNER=1, or leave out what made vLLM "
            "choose it (its log says)",
        ),
        (
            on_cpu and config.compilation_config.mode not in (None, CompilationMode.NONE),
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


def _v2_checks(config: Any) -> list[tuple[bool, str]]:
    """(refused, why) for what model runner V2 has beyond, or does its own way."""
    parallel, mode = config.parallel_config, config.compilation_config.mode
    whole = (None, CompilationMode.NONE, CompilationMode.VLLM_COMPILE)
    return [
        (
            config.lora_config is not None,
            "LoRA (--enable-lora) on model runner V2, whose kernels map rows to adapters once a "
            "step",
        ),
        (
            mode not in whole,
            f"compilation mode {mode}; allowed: 0 (NONE), 3 (VLLM_COMPILE)",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallel (--decode-context-parallel-size, --prefill-context-parallel-size)",
        ),
        (
            bool(parallel.enable_batch_sharded_sampling),
            "batch-sharded sampling (--enable-batch-sharded-sampling), which computes logits past "
            "the exit heads",
        ),
        (
            config.offload_config.prefetch.offload_group_size > 0,
            "weights that are fetched ahead, layer by layer (--offload-group-size)",
        ),
    ]
