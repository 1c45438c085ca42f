"""Engines under test and vanilla ones beside them, and what both answer, in comparable form."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.sampling_params import StructuredOutputsParams

from raee_serve import vector_math
from raee_serve.engine.settings import PROBE_KEY, engine_options, exit_args
from raee_serve.records import ExitHead
from tests.engine.workload import CHUNK

ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_batched_tokens": CHUNK,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 1 << 30,
    "enable_prefix_caching": True,
}
"""float32, for invariant 2 compares there; prompts longer than `CHUNK` take several chunks."""

IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Engine core and worker in the calling process: up in 3 seconds, not 40. The threads of a process
that goes on to other things are not to be bound to cores."""
UNIPROCESS: dict[str, Any] = {"distributed_executor_backend": "uni"}
"""Engine arguments that `IN_PROCESS` needs beside it."""


@contextmanager
def running_engine(checkpoint: Path, **changes: Any) -> Iterator[LLM]:
    """An engine with truncated execution; `changes` go over `ENGINE_ARGS`."""
    llm = LLM(model=str(checkpoint), **{**ENGINE_ARGS, **engine_options(), **changes})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def tiny_args(checkpoint: Path) -> dict[str, Any]:
    """Engine arguments for a checkpoint of `tests.tiny`."""
    return {
        "kv_cache_memory_bytes": 1 << 27,
        "skip_tokenizer_init": not (checkpoint / "tokenizer.json").exists(),
    }


@contextmanager
def engine_in_process(checkpoint: Path, **changes: Any) -> Iterator[LLM]:
    """As `running_engine`, in this process and so up sooner; one at a time."""
    with patch.dict(os.environ, IN_PROCESS):
        try:
            with running_engine(checkpoint, **{**changes, **UNIPROCESS}) as llm:
                yield llm
        finally:
            cleanup_dist_env_and_memory()


@contextmanager
def tiny_engine(checkpoint: Path, **changes: Any) -> Iterator[LLM]:
    """As `engine_in_process`, for checkpoints of `tests.tiny`."""
    with engine_in_process(checkpoint, **{**tiny_args(checkpoint), **changes}) as llm:
        yield llm


def worker_of(llm: LLM) -> Any:
    """The only worker of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def generate_at(
    llm: LLM,
    prompts: Sequence[list[int]],
    exit_layers: Sequence[int],
    heads: Sequence[ExitHead] | None = None,
    **sampling: Any,
) -> list[list[int]]:
    """Greedy tokens of each prompt at its exit, all in one continuous batch."""
    exits = zip(exit_layers, heads or ["plain"] * len(exit_layers), strict=True)
    outcomes = generate_with(llm, prompts, [exit_args(*exit) for exit in exits], **sampling)
    return [outcome["completions"][0]["token_ids"] for outcome in outcomes]


def generate_with(
    llm: LLM,
    prompts: Sequence[list[int]],
    extra_args: Sequence[dict[str, Any]],
    **sampling: Any,
) -> list[dict[str, Any]]:
    """What each prompt gets with its `extra_args`, all in one continuous batch.

    Greedy if nothing else is said; those that leave by probe have one token.
    """
    fields = {"temperature": 0.0, "ignore_eos": True, "detokenize": False} | sampling
    one = {"max_tokens": 1}
    params = [
        SamplingParams(**fields | (one if PROBE_KEY in args else {}), extra_args=args)
        for args in extra_args
    ]
    inputs = [{"prompt_token_ids": p} for p in prompts]
    return [outcome(output) for output in llm.generate(inputs, params, use_tqdm=False)]


def sampling_params(fields: dict[str, Any], exit_layer: int | None = None) -> SamplingParams:
    """`fields` as JSON holds them."""
    fields = dict(fields)
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    extra_args = None if exit_layer is None else exit_args(exit_layer)
    return SamplingParams(**fields, extra_args=extra_args)


def outcome(output: RequestOutput) -> dict[str, Any]:
    """All that a request got, as JSON holds it; log-probabilities by token id."""
    return {
        "prompt_logprobs": _logprobs(output.prompt_logprobs),
        "completions": [
            {
                "token_ids": list(c.token_ids),
                "text": c.text,
                "finish_reason": c.finish_reason,
                "stop_reason": c.stop_reason,
                "logprobs": _logprobs(c.logprobs),
            }
            for c in output.outputs
        ],
    }


def preemptions(llm: Any) -> int:
    """Since the engine was made; it has to keep statistics."""
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def run_vanilla(
    checkpoints: Sequence[Path],
    prompts: Sequence[list[int]],
    fields: Sequence[dict[str, Any]],
    **changes: Any,
) -> list[list[dict[str, Any]]]:
    """By checkpoint, outcomes from vanilla vLLM, one after the other.

    In a process of its own that does not load our plug-in.
    """
    engine = {"enforce_eager": True, **ENGINE_ARGS, **UNIPROCESS, **changes}
    job = {
        "engines": [{"model": str(checkpoint), **engine} for checkpoint in checkpoints],
        "prompts": list(prompts),
        "fields": list(fields),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.engines"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_PLUGINS": "", **IN_PROCESS},
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == len(checkpoints), f"vanilla vLLM did not end:\n{done.stderr[-4000:]}"
    return [json.loads(line.removeprefix("RESULT")) for line in results]


def _logprobs(positions: Any) -> list[dict[str, float]] | None:
    if positions is None:
        return None
    return [{str(t): p.logprob for t, p in (at or {}).items()} for at in positions]


def _vanilla_child() -> None:
    job = json.load(sys.stdin)
    vector_math.settle()
    inputs = [{"prompt_token_ids": p} for p in job["prompts"]]
    params = [sampling_params(fields) for fields in job["fields"]]
    for args in job["engines"]:
        llm = LLM(**args)
        outputs = llm.generate(inputs, params, use_tqdm=False)
        print("RESULT" + json.dumps([outcome(o) for o in outputs]))
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    _vanilla_child()
