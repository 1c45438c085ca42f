"""What truncation itself costs: the share of a decode step that goes into planning it.

Planning is what vanilla vLLM does not do: stating exit layers on the step (scheduler), ordering
rows, and building attention metadata for each stage (worker). The engine runs in this process, so
that both can be timed; the step is all of `LLMEngine.step`.
"""

import argparse
import json
import os
import random
import time
from collections import defaultdict
from statistics import median
from typing import Any

from benchmarks.engine_process import cpu_environment

os.environ.update(cpu_environment(), VLLM_ENABLE_V1_MULTIPROCESSING="0")

from vllm import LLM, SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.depths import mixes
from benchmarks.machine import machine
from raee_serve.checkpoints import local_checkpoint
from raee_serve.engine.scheduler import TruncatingScheduler
from raee_serve.engine.settings import engine_options, exit_args
from raee_serve_patches.v1_step import V1Step

BATCH, PROMPT_LEN, NUM_TOKENS = 64, 32, 48


class Stopwatch:
    """Seconds spent in wrapped methods since it was last read."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: type, method: str) -> None:
        """Time every call of `owner.method` from now on."""
        name, original = f"{owner.__name__}.{method}", getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._seconds[name] += time.perf_counter() - start

        setattr(owner, method, timed)

    def read(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds


def decode_steps(llm: LLM, watch: Stopwatch, exits: list[int]) -> list[tuple[float, float]]:
    """(planning, whole step) in seconds of each step in which all requests decode."""
    rng = random.Random(0)
    for i, depth in enumerate(exits):
        prompt = [rng.randrange(10, 1000) for _ in range(PROMPT_LEN)]
        params = SamplingParams(
            temperature=0.0,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args=exit_args(depth),
        )
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    steps = []
    while llm.llm_engine.has_unfinished_requests():
        start = time.perf_counter()
        llm.llm_engine.step()
        whole = time.perf_counter() - start
        parts = watch.read()
        scheduling = parts["TruncatingScheduler.schedule"] - parts["Scheduler.schedule"]
        steps.append((scheduling + parts["V1Step.enter_forward"], whole))
    return steps[len(steps) - NUM_TOKENS + 2 : -1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--kv-segments", default="auto", metavar="N|auto", help="as of `serve`")
    args = parser.parse_args()
    watch = Stopwatch()
    wrapped: list[tuple[type, str]] = [
        (Scheduler, "schedule"),
        (TruncatingScheduler, "schedule"),
        (V1Step, "enter_forward"),
    ]
    for owner, method in wrapped:
        watch.watch(owner, method)
    llm = LLM(
        model=str(local_checkpoint(args.model)),
        dtype=args.dtype,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 29,
        distributed_executor_backend="uni",
        **engine_options(args.kv_segments),
    )
    num_layers = llm.llm_engine.model_config.get_total_num_hidden_layers()
    batches: dict[str, list[int]] = {
        "full depth": [num_layers] * BATCH,
        "half depth": [num_layers // 2] * BATCH,
        **mixes(num_layers, BATCH),
    }
    print(machine())
    shares = {}
    for name, exits in batches.items():
        steps = decode_steps(llm, watch, exits)
        planning, whole = (median(column) for column in zip(*steps, strict=True))
        shares[name] = round(planning / whole, 4)
        print(
            f"{name:14} planning {planning * 1e3:6.2f} ms of {whole * 1e3:7.1f} ms a step "
            f"({planning / whole:.2%}), {len(steps)} decode steps of {BATCH} requests"
        )
    settings = {name: getattr(args, name) for name in ("model", "dtype", "kv_segments")}
    print(json.dumps(settings | {"planning_share": shares}))


if __name__ == "__main__":
    main()
