"""What cannot run truncated yet is refused at start-up, by name."""

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs

from raee_serve.engine.compat import UnsupportedError, check_engine
from raee_serve.engine.settings import engine_options

pytestmark = pytest.mark.unit


CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
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
        ({"pipeline_parallel_size": 2}, "pipeline parallel size 2"),
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
