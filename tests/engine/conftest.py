"""Engines shared by the tests of one checkpoint; start-up is the dear part."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from raee_serve.engine.settings import engine_options
from tests.engine.workload import CHUNK

ENGINE_ARGS = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_batched_tokens": CHUNK,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 1 << 30,
    "enable_prefix_caching": True,
}
"""float32, for invariant 2 compares there; prompts longer than `CHUNK` take several chunks."""

_VANILLA = """
import json, sys
from vllm import LLM, SamplingParams
job = json.load(sys.stdin)
llm = LLM(**job["engine"])
params = SamplingParams(**job["sampling"])
outputs = llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], params, use_tqdm=False)
print("RESULT" + json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""


@dataclass(frozen=True)
class ServedModel:
    """A running engine with truncated execution and the checkpoint it serves."""

    name: str
    checkpoint: Path
    llm: object
    num_layers: int
    vocab_size: int
    first_token: int


@pytest.fixture(scope="session", autouse=True)
def cpu_engine_environment():
    """All cores for the worker (nothing else runs), and the model runner we support."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"


@pytest.fixture(scope="session", params=["smollm2", "gemma3"])
def served(request):
    """The real models one after the other: a new engine starts when the last one is done."""
    from vllm import LLM

    checkpoint = request.getfixturevalue(request.param)
    llm = LLM(model=str(checkpoint), **ENGINE_ARGS, **engine_options())
    config = llm.llm_engine.model_config
    tokenizer = llm.get_tokenizer()
    yield ServedModel(
        request.param,
        checkpoint,
        llm,
        config.get_total_num_hidden_layers(),
        config.get_vocab_size(),
        tokenizer.bos_token_id or 0,
    )
    llm.llm_engine.engine_core.shutdown()


def run_vanilla(checkpoint: Path, prompts: list[list[int]], **sampling) -> list[list[int]]:
    """Tokens of vanilla vLLM, in a process of its own that does not load our plug-in."""
    job = {
        "engine": {"model": str(checkpoint), "enforce_eager": True, **ENGINE_ARGS},
        "sampling": sampling,
        "prompts": prompts,
    }
    done = subprocess.run(
        [sys.executable, "-c", _VANILLA],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_PLUGINS": ""},
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, f"vanilla vLLM gave no result:\n{done.stderr[-4000:]}"
    return json.loads(results[0].removeprefix("RESULT"))
