"""What a small KV cache holds, and what that is worth, with depth segments and without.

The pool is the same for all, a few full-depth requests long, and `max_num_seqs` is out of the way.

- capacity_efficiency: requests running at once at one depth d, segments on, / vanilla's, as a share
  of num_layers / d. Running at once: the median over the steps in which others wait.
- preemptions, throughput (prompt and output tokens a second), running: medians of a mix of six
  depths, segments on and off, in turns A B B A. speedup: the pairs' throughput ratio on / off.
  as_many: with segments on, but no more requests running than without them.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.arguments import add_model_arguments
from benchmarks.depths import DEPTHS, depth_named, mixes
from benchmarks.engine_process import EngineProcess, Job, cpu_environment
from benchmarks.machine import machine
from benchmarks.statistics import paired_ratio
from benchmarks.workloads import Workload
from raee_serve.checkpoints import local_checkpoint
from raee_serve.engine.settings import engine_options, exit_args
from raee_serve.retrieval.drawing import pyplot

BLOCK, MAX_LEN = 128, 512
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Engine core and worker in one process, so that its scheduler can be looked at."""


def started(engine: Job, options: Job) -> EngineProcess:
    """An engine of this module's; `options` are the extension's, none for vanilla vLLM."""
    name = "raee-serve" if options else "vanilla"
    command = ("benchmarks.kv_capacity", "--engine")
    environment = cpu_environment() | IN_PROCESS
    system = EngineProcess(name, engine, options, environment, command=command)
    system.ready()
    return system


def run_engine() -> None:
    """The process of such a system: engine arguments in, then a job a line."""
    from vllm import LLM

    jobs = iter(sys.stdin.readline, "")
    llm = LLM(**json.loads(next(jobs)))
    print("ANSWER" + json.dumps({}), flush=True)
    for line in jobs:
        print("ANSWER" + json.dumps(run(llm, json.loads(line))), flush=True)


def run(llm: Any, job: Job) -> Job:
    """Serve the job's requests, all there from the start, up to `most_running` at once."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    scheduler.max_num_active_reqs = job["most_running"]
    preempted = _preemptions(llm)
    exits = job["exit_layers"] or [None] * len(job["prompts"])
    start = time.perf_counter()
    for i, (prompt, exit_layer) in enumerate(zip(job["prompts"], exits, strict=True)):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=job["output_len"],
            ignore_eos=True,
            detokenize=False,
            extra_args=None if exit_layer is None else exit_args(exit_layer),
        )
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    running = []
    while engine.has_unfinished_requests():
        engine.step()
        if scheduler.waiting:
            running.append(len(scheduler.running))
    return {
        "seconds": time.perf_counter() - start,
        "running": median(running) if running else len(exits),
        "preemptions": _preemptions(llm) - preempted,
    }


def _preemptions(llm: Any) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def pool_bytes(checkpoint: Path, dtype: str, num_requests: int, tokens: int) -> int:
    """KV bytes of `num_requests` requests of `tokens` tokens at full depth, and the null block."""
    config = AutoConfig.from_pretrained(checkpoint)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = config.num_hidden_layers * config.num_key_value_heads * 2 * head_dim
    blocks = num_requests * -(-tokens // BLOCK) + 1
    return blocks * BLOCK * values * getattr(torch, dtype).itemsize


def measure(args: argparse.Namespace) -> dict[str, Any]:
    checkpoint = local_checkpoint(args.model)
    config = AutoConfig.from_pretrained(checkpoint)
    num_layers, vocab_size = config.num_hidden_layers, config.vocab_size
    workload = Workload("kv-pressure", args.requests, args.prompt_len, args.output_len)
    engine = {
        "model": str(checkpoint),
        "dtype": args.dtype,
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": args.requests,
        "kv_cache_memory_bytes": pool_bytes(
            checkpoint, args.dtype, args.pool_requests, args.prompt_len + args.output_len
        ),
        "disable_log_stats": False,
        "distributed_executor_backend": "uni",
    }
    seed = iter(range(1_000_000))

    def ask(system: EngineProcess, exits: list[int] | None, most: int = args.requests) -> Job:
        job = workload.job(next(seed), vocab_size, exits) | {"most_running": most}
        answer = system.ask(job)
        print(f"  {answer}", flush=True)
        return answer

    print("vanilla, full depth", flush=True)
    vanilla = started(engine, {})
    whole = ask(vanilla, None)["running"]
    vanilla.close()
    on = started(engine, engine_options(kv_segments=args.segments))
    efficiency, running = {}, {num_layers: whole}
    for depth in (depth_named(name, num_layers) for name in args.depths):
        print(f"segments on, depth {depth}", flush=True)
        running[depth] = ask(on, [depth] * args.requests)["running"]
        efficiency[depth] = round(running[depth] / whole / (num_layers / depth), 3)
    off = started(engine, engine_options(kv_segments=1))
    exits = mixes(num_layers, args.requests)["six-depths"]
    answers: dict[str, list[Job]] = {"on": [], "off": []}
    for pair in range(args.pairs):
        turns = [("on", on), ("off", off)]
        for name, system in turns if pair % 2 else turns[::-1]:
            print(f"six depths, segments {name}", flush=True)
            answers[name].append(ask(system, exits))
    print("six depths, segments on, no more running than with segments off", flush=True)
    without = int(median(a["running"] for a in answers["off"]))
    answers["as_many"] = [ask(on, exits, without)]
    for system in (on, off):
        system.close()
    seconds = {name: [a["seconds"] for a in found] for name, found in answers.items()}
    return {
        "model": args.model,
        "dtype": args.dtype,
        "num_layers": num_layers,
        "segments": args.segments,
        "requests": args.requests,
        "machine": machine(),
        "running_at_depth": running,
        "capacity_efficiency": efficiency,
        "mixed_mean_depth": sum(exits) / len(exits),
        "running": {n: median(a["running"] for a in found) for n, found in answers.items()},
        "preemptions": {n: median(a["preemptions"] for a in found) for n, found in answers.items()},
        "throughput": {n: round(workload.num_tokens / median(t), 1) for n, t in seconds.items()},
        "speedup": paired_ratio(seconds["off"], seconds["on"]).as_dict(),
    }


def draw(result: dict[str, Any], target: Path) -> None:
    """One PNG: requests running at once against their depth, and those of a cache that is whole."""
    plt = pyplot()
    num_layers, running = result["num_layers"], result["running_at_depth"]
    whole, depths = running[num_layers], sorted(running)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=150)
    axes.axhline(whole, color="#6b6b6b", linestyle=":", label="vanilla vLLM, at any depth")
    ideal = [whole * num_layers / d for d in depths]
    axes.plot(depths, ideal, color="#c77d0a", marker="s", label="in proportion to depth")
    measured = [d for d in depths if d != num_layers]  # full depth is vanilla's
    ours = [running[d] for d in measured]
    axes.plot(measured, ours, color="#0b6e4f", marker="o", label="raee-serve, KV cache by depth")
    axes.set_xticks(depths)
    axes.set_xlabel(f"exit layer, of {num_layers}")
    axes.set_ylabel("requests running at once")
    axes.set_title(f"{result['model']}, {result['dtype']}, one small KV cache", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(target)


def main() -> None:
    if sys.argv[1:] == ["--engine"]:
        run_engine()
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--segments", default="auto", metavar="N|auto")
    parser.add_argument(
        "--depths",
        nargs="*",
        default=[name for name in DEPTHS if name != "full"],
        metavar="D",
        help=f"{', '.join(DEPTHS)} or numbers of layers (default: third half two-thirds)",
    )
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=192)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument(
        "--pool-requests", type=int, default=8, help="full-depth requests the KV cache holds"
    )
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--png", type=Path, help="draw requests at once against depth")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    print(machine())
    result = measure(args)
    if args.png:
        draw(result, args.png)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
