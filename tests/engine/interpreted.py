"""Model runner V2 without a GPU, in a process of its own.

Its kernels are written in Triton, which has no back end for CPUs but an interpreter that runs them
as NumPy. vLLM looks for a back end named "cpu" before it uses Triton on a CPU, so this process
names one; it is never asked to compile anything. All else is vLLM's: its CPU worker takes this
runner where `VLLM_USE_V2_MODEL_RUNNER` says so.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

V2_ON_CPU = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def generate_on_v2(jobs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What engines that start one after the other answer.

    jobs: for each engine its "checkpoint", its "changes" to `tiny_engine`'s arguments and its
        "runs", each the arguments of `generate_at` after the engine, or those of `generate_with` if
        there are "extra_args". With "graph_sizes" its segments of layers are captured at these
        sizes, though not as CUDA graphs: a replay calls the captured function again. With
        "is_compiled" they are of compiled layers. "probes": a file for each probe set to load.
    Scheduling is asynchronous unless the changes say otherwise, as vLLM has it on CUDA.
    Returns for each run its "tokens", a list a prompt, or its "outcomes", how many "preemptions" it
    took, how many of its steps were "replayed", the shapes of its "logits", whether scheduling was
    "async", and how many graphs the engine has "compiled".
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.interpreted"],
        input=json.dumps(list(jobs)),
        capture_output=True,
        text=True,
        env={**os.environ, **V2_ON_CPU},
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, f"model runner V2 gave no result:\n{done.stderr[-6000:]}"
    return json.loads(results[0].removeprefix("RESULT"))


def main() -> None:
    name_cpu_backend()
    keep_async_scheduling()
    print("RESULT" + json.dumps([run_engine(**job) for job in json.load(sys.stdin)]))


def run_engine(
    checkpoint: str,
    runs: list[dict[str, Any]],
    changes: dict[str, Any],
    graph_sizes: Sequence[int] = (),
    is_compiled: bool = False,
    probes: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    from torch._dynamo.utils import counters

    from tests.engine.engines import (
        generate_at,
        generate_with,
        preemptions,
        tiny_engine,
        worker_of,
    )

    results = []
    counters.clear()
    engine = tiny_engine(Path(checkpoint), disable_log_stats=False, **changes)
    with engine as llm, ExitStack() as while_it_runs:
        worker, replayed = worker_of(llm), []
        warm_up(worker)
        logits = shapes_of_logits(worker)
        for set_id, file in (probes or {}).items():
            llm.collective_rpc("load_probes", args=(set_id, Path(file).read_bytes()))
        if graph_sizes:
            replayed = replay_functions(worker, graph_sizes, is_compiled, while_it_runs)
        is_async = llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        for run in runs:
            preempted = preemptions(llm)
            replayed.clear()
            logits.clear()
            has_extra_args = "extra_args" in run
            generate = generate_with if has_extra_args else generate_at
            results.append(
                {
                    "outcomes" if has_extra_args else "tokens": generate(llm, **run),
                    "logits": list(logits),
                    "preemptions": preemptions(llm) - preempted,
                    "replayed": len(replayed),
                    "async": is_async,
                    "compiled": counters["stats"]["unique_graphs"],
                }
            )
    return results


def shapes_of_logits(worker: Any) -> list[tuple[int, ...]]:
    """Of all logits that the model computes from now on."""
    model, shapes = worker.model_runner.model, []
    compute = model.compute_logits

    def noted(hidden_states: Any) -> Any:
        logits = compute(hidden_states)
        shapes.append(tuple(logits.shape))
        return logits

    model.compute_logits = noted
    return shapes


def warm_up(worker: Any) -> None:
    """With a step that no scheduler planned, as all are of a CUDA worker's warm-up.

    This one has no requests: the interpreter cannot run all kernels of the sampler.
    """
    from vllm.v1.core.sched.output import SchedulerOutput

    worker.execute_model(SchedulerOutput.make_empty())


def replay_functions(
    worker: Any, sizes: Sequence[int], is_compiled: bool, while_it_runs: ExitStack
) -> list[tuple[int, ...]]:
    """Capture the model's segments as functions; returns the sizes of each step replayed later."""
    import torch

    from raee_serve_patches.compiled_layers import CompiledLayers

    runner = worker.model_runner
    state = runner.model_state
    config = as_compiling(runner.vllm_config) if is_compiled else runner.vllm_config
    compiled = CompiledLayers(config, state._decoder.layers)
    for _ in range(2):  # vLLM does so too, first to see how much memory graphs take
        with torch.inference_mode(), compiled.open() as layers:
            graphs = state.segment_graphs(
                sizes, runner.block_tables, runner.attn_groups, called_once, layers
            )
    while_it_runs.enter_context(compiled.open())  # for functions, unlike graphs, look again
    replayed: list[tuple[int, ...]] = []
    run = graphs.run

    def counted(step: Any, layout: Any, *args: Any) -> Any:
        replayed.append(layout.sizes)
        return run(step, layout, *args)

    graphs.run = counted
    state._graphs = graphs
    return replayed


def as_compiling(config: Any) -> Any:
    """As vLLM's configuration is on CUDA, where operators are left to the compiler.

    The Triton back end that vLLM was shown is taken back, or Inductor would use it.
    """
    from triton.backends import backends
    from vllm.config.compilation import CompilationMode, PassConfig

    backends.pop("cpu", None)
    config = copy.copy(config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.custom_ops = ["none"]
    # Without what names CUDA's kernels: fusions, and the clean-up after functionalization's first
    # version.
    config.compilation_config.pass_config = PassConfig()
    config.compilation_config.inductor_compile_config = {}
    return config


def called_once(function: Callable[[], None]) -> Callable[[], None]:
    """As capture does, before it records what the function does."""
    function()
    return function


def name_cpu_backend() -> None:
    """Before vLLM is imported."""
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: True)
    backends.setdefault("cpu", SimpleNamespace(driver=driver, compiler=None))


def keep_async_scheduling() -> None:
    """Let an engine schedule a step while the one before it runs, as vLLM does on CUDA."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def updated(cls: type, config: Any) -> None:
        asked = config.scheduler_config.async_scheduling
        update(cls, config)
        config.scheduler_config.async_scheduling = asked

    CpuPlatform.check_and_update_config = classmethod(updated)


if __name__ == "__main__":
    main()
