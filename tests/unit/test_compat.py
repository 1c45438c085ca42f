"""What cannot run truncated yet is refused at start-up, by name."""

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs

from raee_serve.engine.compat import UnsupportedError, check_engine
from raee_serve.engine.settings import engine_options

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def model_runner_v1(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")


def config(smollm2, **changes):
    return EngineArgs(
        **{"model": str(smollm2), "max_model_len": 1024, **engine_options(), **changes}
    ).create_engine_config()


def test_supported_configuration_passes(smollm2):
    check_engine(config(smollm2))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"enable_lora": True}, "LoRA"),
        ({"pipeline_parallel_size": 2}, "pipeline parallel size 2"),
        ({"enforce_eager": False}, "torch.compile"),
        ({"scheduler_cls": None}, "TruncatingScheduler"),
        ({"worker_cls": "auto"}, "TruncatingCPUWorker"),
        ({"kv_sharing_fast_prefill": True}, "kv-sharing-fast-prefill"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
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
