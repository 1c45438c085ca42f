"""Whether vLLM runs here at all, and whether exits give the tokens of cut checkpoints."""

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle, islice
from math import inf
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.deadline import Deadline
from benchmarks.depths import DEPTHS, depth_named
from benchmarks.engine_process import EngineProcess, Job
from benchmarks.fleet import Machinery
from benchmarks.shapes import SHAPES
from raee_serve.cut import cut_checkpoint

SHAPE = SHAPES["tiny"]
NUM_REQUESTS, NUM_TOKENS = 64, 20
PROMPT_LENGTHS = (600, 90, 20, 5, 300, 33, 12)
"""In turn, as depths are, of which there are not as many; the longest take several steps."""
TIE = 1e-4
"""Difference of log-probability within which two greedy choices count as equal."""
ENGINE_ARGS: dict[str, Any] = {
    "dtype": SHAPE.dtype,
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "max_num_seqs": NUM_REQUESTS,
    "gpu_memory_utilization": 0.01,
    "kv_cache_memory_bytes": SHAPE.kv_bytes(SHAPE.num_layers, 40_960),
}


def check(machinery: Machinery, deadline: Deadline) -> dict[str, Any]:
    """A generation by vanilla vLLM; then mixed depths in one batch against cut checkpoints.

    Random weights, greedy. Returns how many requests gave `equal` tokens, how many went another way
    at a tie and how many were wrong. Raises `EngineError` for an engine that does not run.
    """
    checkpoint = random_checkpoint(machinery.workdir / "check")
    depths = sorted({depth_named(name, SHAPE.num_layers) for name in DEPTHS})
    exits = list(islice(cycle(depths), NUM_REQUESTS))
    prompts = random_prompts()
    with ExitStack() as stack:

        def start(name: str, depth: int, points: Sequence[int] | None = None) -> EngineProcess:
            path = cut_checkpoint(checkpoint, depth, machinery.workdir / f"check-{depth}")
            process = machinery.start(f"check {name}", {"model": str(path), **ENGINE_ARGS}, points)
            stack.callback(process.close)
            return process

        def tell(process: EngineProcess, job: Job) -> Job:
            return process.ask(job, max(1.0, deadline.left_s))

        vanilla = {d: start(f"vanilla {d} layers", d) for d in reversed(depths)}
        ours = start("raee-serve", SHAPE.num_layers, depths)
        for process in (*vanilla.values(), ours):
            process.ready(max(1.0, deadline.left_s))
            if process is vanilla[SHAPE.num_layers]:
                said = tell(process, job(prompts[1:2]))["tokens"][0]
                print(f"vanilla vLLM runs: {len(said)} tokens {said}", flush=True)
        tokens = tell(ours, job(prompts, exits))["tokens"]
        gaps: list[float | None] = []
        for depth, process in vanilla.items():
            there = [i for i, exit_layer in enumerate(exits) if exit_layer == depth]
            reference = tell(process, job([prompts[i] for i in there]))
            own = [tokens[i] for i in there]
            gaps += map(gap, own, reference["tokens"], reference["logprobs"])
    return verdict(gaps)


def random_checkpoint(directory: Path) -> Path:
    """Weights wide enough that layers differ clearly in what they say, and norms not all alike."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(SHAPE.write(SHAPE.num_layers, directory / "shape"))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(directory / "model")
    return directory / "model"


def random_prompts() -> list[list[int]]:
    rng = random.Random(0)
    lengths = islice(cycle(PROMPT_LENGTHS), NUM_REQUESTS)
    return [[rng.randrange(10, SHAPE.config["vocab_size"]) for _ in range(n)] for n in lengths]


def job(prompts: list[list[int]], exits: list[int] | None = None) -> Job:
    return {"prompts": prompts, "output_len": NUM_TOKENS, "exit_layers": exits, "logprobs": 2}


def gap(
    tokens: Sequence[int], reference: Sequence[int], logprobs: Sequence[Mapping[str, float]]
) -> float | None:
    """How much likelier the reference's own token was where the two part; None where they do not.

    logprobs: of the reference's two best tokens at each place, by token id; infinite for others.
    """
    for own, other, at in zip(tokens, reference, logprobs, strict=True):
        if own != other:
            return at[str(other)] - at.get(str(own), -inf)
    return None


def verdict(gaps: Sequence[float | None]) -> dict[str, Any]:
    """largest_gap: among those that are finite."""
    parted = [g for g in gaps if g is not None]
    wrong = [g for g in parted if g > TIE]
    return {
        "requests": len(gaps),
        "equal": len(gaps) - len(parted),
        "ties": len(parted) - len(wrong),
        "wrong": len(wrong),
        "largest_gap": max((g for g in parted if g < inf), default=0.0),
    }
