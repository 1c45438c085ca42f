"""What the server refuses to start with, before an engine is loaded."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry
from vllm.platforms import current_platform

from raee_serve.cli import main
from raee_serve.cut import cut_checkpoint
from raee_serve.engine.settings import RESTING_EXECUTOR, engine_options
from raee_serve.server import loading, vllm_server
from raee_serve.server.admission import Admission
from raee_serve.server.limits import LabelOutputs
from raee_serve.server.metrics import DecisionMetrics
from tests.server.conftest import MODEL

pytestmark = pytest.mark.server


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs `raee-serve serve` with these arguments and gives the one-line error it ends with."""

    async def serve(args, gate, watch_table_s):
        pytest.fail("the server would have started")

    monkeypatch.setattr(vllm_server, "serve", serve)

    def run(*arguments, status=1):
        assert main(["serve", *map(str, arguments)]) == status
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


@pytest.fixture
def started(monkeypatch):
    """Runs `raee-serve serve` up to its engine: (arguments of vLLM's server, gate)."""
    begun = {}

    async def serve(args, gate, watch_table_s):
        begun.update(args=args, gate=gate)

    monkeypatch.setattr(vllm_server, "serve", serve)
    monkeypatch.setattr(  # a process has one server, and this one several
        loading, "DecisionMetrics", lambda layers, _: DecisionMetrics(layers, CollectorRegistry())
    )

    def run(*arguments):
        assert main(["serve", *arguments]) == 0
        return begun["args"], begun["gate"]

    return run


def test_neither_a_table_nor_a_depth():
    """In a process of its own, to see the exit code; it ends before vLLM is even imported."""
    command = [sys.executable, "-m", "raee_serve.cli", "serve", MODEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("raee-serve serve: error: give either --table DIR")
    assert "--exit-layer N|full" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table", "somewhere", "--exit-layer", "3"], "give either --table"),
        (["--table", "somewhere", "--k", "0"], "--k is 0; allowed: 1..1024"),
        (["--table", "somewhere", "--head", "fused"], "'fused'; allowed: plain, probe"),
        (["--table", "somewhere", "--budget", "0"], "--budget is 0.0; allowed: above 0"),
        (["--table", "somewhere", "--lookup-timeout-ms", "0"], "allowed: more than 0"),
        (["--table", "somewhere", "--max-distance", "3"], "allowed: 0..2"),
        (["--table", "somewhere", "--sample-full", "2"], "--sample-full is 2.0; allowed: 0..1"),
        (["--table", "somewhere", "--min-exit-layer", "x"], "allowed: N or TASK=N"),
        (["--exit-layer", "4", "--min-exit-layer", "9"], "'4'; allowed: 9..30"),
        (["--exit-layer", "4", "--min-exit-layer", "31"], "allowed: 1..30"),
        (["--exit-layer", "4", "--max-prompts", "0"], "--max-prompts is 0; allowed: at least 1"),
        (["--exit-layer", "3", "--kv-segments", "x"], "'x'; allowed: auto or an integer of at"),
        (["--exit-layer", "0"], "'0'; allowed: 1..30 or 'full'"),
        (["--exit-layer", "31"], "'31'; allowed: 1..30 or 'full'"),
        (["--exit-layer", "half"], "'half'; allowed: 1..30 or 'full'"),
        (["--exit-layer", "3", "--api-server-count", "2"], "--api-server-count 2; allowed: 1"),
        (["--exit-layer", "3", "--pipeline-parallel-size", "2"], "-size 2; allowed: 1"),
        (["--exit-layer", "3", "--headless"], "--headless"),
        (["--exit-layer", "3", "--grpc"], "--grpc"),
        (["--exit-layer", "3", "--revision", "main"], "--revision main"),
        (["--exit-layer", "3", "--reasoning-parser", "qwen3"], "--reasoning-parser qwen3"),
        (["--exit-layer", "3", "--scheduler-cls", "a.B"], "raee-serve needs its own"),
        (["--exit-layer", "3", "--worker-cls", "a.B"], "raee-serve needs its own"),
    ],
)
def test_flags_that_cannot_work_are_refused_by_name(refused, smollm2, flags, message):
    assert message in refused(MODEL, *flags)


def test_kv_segments_reach_the_engine_beside_the_users_own_config():
    given = ["m", "--additional-config", '{"mine": 1}']
    args = vllm_server.parse_serve_args(given)
    vllm_server.with_options(args, engine_options(kv_segments=2))
    assert args.additional_config == {"mine": 1, "raee_kv_segments": 2}
    args = vllm_server.parse_serve_args(given)
    vllm_server.with_options(args, engine_options())
    assert args.additional_config == {"mine": 1}


def test_the_engine_core_rests_unless_the_user_chose_an_executor_or_vanilla(monkeypatch):
    def executor(*flags):
        args = vllm_server.parse_serve_args(["m", *flags])
        vllm_server.with_options(args, engine_options())
        return args.distributed_executor_backend

    assert executor() == (RESTING_EXECUTOR if current_platform.is_cpu() else None)
    assert executor("--distributed-executor-backend", "mp") == "mp"
    monkeypatch.setenv("RAEE_OFF", "1")
    assert executor() is None


def test_a_missing_model(refused):
    assert "no model given" in refused("--exit-layer", "3")


def test_a_plug_in_filter_without_ours(refused, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "others")
    assert "VLLM_PLUGINS=others" in refused(MODEL, "--exit-layer", "3")


def test_a_missing_table(refused, smollm2, tmp_path):
    assert str(tmp_path / "none") in refused(MODEL, "--table", tmp_path / "none")


def test_a_corrupt_table(refused, built_table, tmp_path):
    corrupt = tmp_path / "corrupt"
    shutil.copytree(built_table, corrupt)
    for file in corrupt.glob("exits.lance/data/*"):
        file.write_bytes(file.read_bytes()[:100])
    assert str(corrupt) in refused(MODEL, "--table", corrupt)


def test_another_backbone_names_both_sides(refused, built_table, smollm2, tmp_path):
    cut = cut_checkpoint(smollm2, 10, tmp_path / "cut")
    message = refused(cut, "--table", built_table)
    assert "30" in message and "10" in message


def test_another_encoder_names_both_sides(refused, built_table, minilm, tmp_path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(minilm, other)
    weights = load_file(other / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    message = refused(MODEL, "--table", built_table, "--encoder", other)
    assert "minilm" in message and str(other) in message


def test_the_kv_cache_is_sized_and_its_size_told(started, monkeypatch, smollm2, capsys):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    args, _ = started(MODEL, "--exit-layer", "full")
    size = args.kv_cache_memory_bytes / (1 << 30)
    assert f"(LlamaForCausalLM, 30 layers), KV cache {size:.1f} GiB" in capsys.readouterr().out
    args, _ = started(MODEL, "--exit-layer", "full", "--gpu-memory-utilization", "0.4")
    assert args.kv_cache_memory_bytes is None
    assert "(LlamaForCausalLM, 30 layers)\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--table", "/nowhere")])
def test_the_kill_switch_starts_vllms_own_engine_without_the_table(
    started, monkeypatch, smollm2, capsys, flags
):
    monkeypatch.setenv("RAEE_OFF", "1")
    args, gate = started(MODEL, *flags)
    assert args.worker_cls == "auto" and not args.scheduler_cls
    assert gate.admission.off
    assert "RAEE_OFF=1: every request runs vanilla vLLM" in capsys.readouterr().out


def test_as_many_logprobs_are_allowed_as_there_are_labels_unless_the_user_says():
    names = tuple(map(str, range(150)))
    many = LabelOutputs(names, (), {}, (), is_fitted=True)
    gate = SimpleNamespace(admission=Admission(30, labels={"intents": many}))

    def allowed(*flags, gate=gate):
        args = vllm_server.parse_serve_args(["m", *flags])
        vllm_server.allow_logprobs(args, gate)
        return args.max_logprobs

    assert allowed() == 150
    assert allowed("--max-logprobs", "30") == 30
    assert allowed(gate=SimpleNamespace(admission=Admission(30))) == 20
