"""What cannot run truncated yet is refused at start-up, by name."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import CompilationMode
from vllm.engine.arg_utils import EngineArgs

from raee_serve.engine import compat
from raee_serve.engine.compat import UnsupportedError, check_attention, check_engine
from raee_serve.engine.settings import (
    CPU_WORKER_CLS,
    GPU_WORKER_CLS,
    RESTING_EXECUTOR,
    SCHEDULER_CLS,
    engine_options,
    exit_points,
)

pytestmark = pytest.mark.unit


CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
ONE_OF_VLLMS = {"distributed_executor_backend": "mp"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2}


@pytest.fixture(autouse=True)
def model_runner_v1(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")


def config(smollm2, **changes):
    return EngineArgs(
        **{"model": str(smollm2), "max_model_len": 1024, **engine_options(), **changes}
    ).create_engine_config()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"enable_lora": True},
        {"speculative_config": NGRAM},
        {"enable_prefix_caching": False},
        {"enable_chunked_prefill": False},
    ],
    ids=str,
)
def test_supported_configuration_passes(smollm2, changes):
    check_engine(config(smollm2, **changes))


def test_speculation_from_hidden_states_is_named(smollm2):
    changed = config(smollm2, speculative_config=NGRAM)
    changed.speculative_config.method = "eagle"
    with pytest.raises(UnsupportedError, match=r"by 'eagle'.* allowed: ngram"):
        check_engine(changed)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pipeline_parallel_size": 2, **ONE_OF_VLLMS}, "pipeline parallel size 2"),
        ({"enforce_eager": False}, "torch.compile"),
        ({"scheduler_cls": None}, "truncating_scheduler"),
        ({"worker_cls": "auto"}, "TruncatingCPUWorker"),
        ({"kv_sharing_fast_prefill": True}, "kv-sharing-fast-prefill"),
        ({"kv_transfer_config": CONNECTOR}, "KV connectors"),
        ({"runner": "pooling"}, "runner type 'pooling'"),
    ],
)
def test_unsupported_configuration_is_named(smollm2, changes, named):
    with pytest.raises(UnsupportedError, match=named):
        check_engine(config(smollm2, **changes))


def test_model_runner_v2_is_named(smollm2, monkeypatch):
    """By vLLM itself where Triton has no CPU back end, by us where it has one."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises((UnsupportedError, ValueError), match=r"(?i)model runner v2"):
        check_engine(config(smollm2))


@pytest.fixture
def cuda(monkeypatch):
    """As on a machine with a GPU, as far as checks can tell."""
    platform = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False, device_name="cuda")
    monkeypatch.setattr(compat, "current_platform", platform)


def cuda_config(smollm2, monkeypatch, runner="1", **changes):
    changed = config(smollm2, worker_cls=GPU_WORKER_CLS, **changes)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    return changed


def test_v2_on_cuda_passes_compiled_or_not(smollm2, cuda, monkeypatch):
    changed = cuda_config(smollm2, monkeypatch)
    for mode in (CompilationMode.NONE, CompilationMode.VLLM_COMPILE):
        changed.compilation_config.mode = mode
        check_engine(changed)


def test_model_runner_v1_on_cuda_is_named(smollm2, cuda, monkeypatch):
    with pytest.raises(UnsupportedError, match="model runner V1 on CUDA; set VLLM_USE_V2"):
        check_engine(cuda_config(smollm2, monkeypatch, runner="0"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"enable_lora": True}, "LoRA"),
        ({"worker_cls": CPU_WORKER_CLS}, "gpu_worker.TruncatingGPUWorker"),
        ({"pipeline_parallel_size": 2, **ONE_OF_VLLMS}, "pipeline parallel size 2"),
        ({"kv_transfer_config": CONNECTOR}, "KV connectors"),
    ],
    ids=["lora", "worker", "pipeline", "connector"],
)
def test_what_cuda_cannot_run_is_named(smollm2, cuda, monkeypatch, changes, named):
    changed = config(smollm2, **{"worker_cls": GPU_WORKER_CLS, **changes})
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(UnsupportedError, match=named):
        check_engine(changed)


def test_what_only_v2_has_is_named(smollm2, cuda, monkeypatch):
    changed = cuda_config(smollm2, monkeypatch)
    changed.compilation_config.mode = CompilationMode.STOCK_TORCH_COMPILE
    changed.parallel_config.decode_context_parallel_size = 2
    changed.parallel_config.enable_batch_sharded_sampling = True
    changed.offload_config.prefetch.offload_group_size = 8
    named = (
        r"compilation mode .*; context parallel .*; batch-sharded sampling .*; "
        "weights that are fetched ahead"
    )
    with pytest.raises(UnsupportedError, match=named):
        check_engine(changed)


def test_other_platforms_are_named(smollm2, monkeypatch):
    platform = SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: False, device_name="tpu")
    monkeypatch.setattr(compat, "current_platform", platform)
    with pytest.raises(UnsupportedError, match="platform tpu; allowed: cpu, cuda"):
        check_engine(config(smollm2))


@pytest.mark.parametrize("name", ["FLASHINFER", "FLEX_ATTENTION"])
def test_attention_that_plans_on_the_host_is_named(monkeypatch, name):
    backend = SimpleNamespace(get_name=lambda: name)
    layers = {"layers.0": SimpleNamespace(get_attn_backend=lambda: backend)}
    monkeypatch.setattr(compat, "get_layers_from_vllm_config", lambda *_: layers)
    with pytest.raises(UnsupportedError, match=rf"{name}; allowed: FLASH_ATTN, TRITON_ATTN"):
        check_attention(None)


def test_options_are_those_of_the_torch_build(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    options = engine_options(exit_points=[4, 8])
    assert options["worker_cls"] == GPU_WORKER_CLS and "enforce_eager" not in options
    assert exit_points(options["additional_config"], 12) == (4, 8, 12)
    assert exit_points({}, 12)[-1] == 12
    monkeypatch.setattr(torch.version, "cuda", None)
    assert engine_options() == {
        "scheduler_cls": SCHEDULER_CLS,
        "worker_cls": CPU_WORKER_CLS,
        "enforce_eager": True,
        "distributed_executor_backend": RESTING_EXECUTOR,
    }
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    assert "distributed_executor_backend" not in engine_options()
