"""vLLM's OpenAI server around a `DepthClient`: its own parser, engine, routes and flags."""

from __future__ import annotations

import asyncio
import os
import signal
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node
from vllm.utils.system_utils import decorate_logs

from raee_serve.checkpoints import weight_files
from raee_serve.engine.settings import is_off
from raee_serve.errors import RaeeError
from raee_serve.server.cores import spare_cores
from raee_serve.server.engine_client import DepthClient
from raee_serve.server.gate import Gate
from raee_serve.server.lookup import LookupBatcher
from raee_serve.server.memory import STEP_TOKENS, Memory, kv_cache_bytes, longest_request_bytes
from raee_serve.server.middleware import MIDDLEWARE
from raee_serve.table.probe import default_dtype

PLUGIN = "raee"
"""Name of our `vllm.general_plugins` entry point."""


class ServeError(RaeeError):
    """Serve arguments that cannot work."""


def prepare_environment() -> None:
    """Environment defaults, for this process and the engine's; a user's own settings stand."""
    cli_env_setup()
    if current_platform.is_cpu():
        # The V2 CPU runner is not supported; vLLM picks V1 only while triton has no CPU back end.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")


def parse_serve_args(rest: Sequence[str]) -> Namespace:
    """`rest` as `vllm serve` parses it (model, flags, --config), checked.

    `kv_cache_is_sized` among them tells whether the user said how large the KV cache is to be,
    `max_logprobs_is_given` whether --max-logprobs is the user's.
    Exits as argparse does on a flag that vLLM does not know. Raises ServeError for a missing
    model and for what raee-serve cannot serve with.
    """
    parser = FlexibleArgumentParser(prog="raee-serve")
    subcommand = ServeSubcommand()
    serve_parser = subcommand.subparser_init(parser.add_subparsers(dest="subparser"))
    told = ("gpu_memory_utilization", "max_logprobs")
    defaults = {name: serve_parser.get_default(name) for name in told}
    serve_parser.set_defaults(**dict.fromkeys(told))  # so that given ones can be told
    args = parser.parse_args(["serve", *rest])
    args.kv_cache_is_sized = _is_kv_cache_sized(args)
    args.max_logprobs_is_given = args.max_logprobs is not None
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    configure_logging_from_args(args)
    subcommand.validate(args)
    if not args.model_tag:
        raise ServeError("no model given; usage: raee-serve serve MODEL --table DIR")
    problems = [reason for refused, reason in _refusals(args) if refused]
    if problems:
        raise ServeError("raee-serve cannot serve with: " + "; ".join(problems))
    return args


def _is_kv_cache_sized(args: Namespace) -> bool:
    """Whether the user said how much memory the KV cache is to take."""
    given = (args.gpu_memory_utilization, args.kv_cache_memory_bytes)
    return given != (None, None) or bool(os.environ.get("VLLM_CPU_KVCACHE_SPACE"))


def _refusals(args: Namespace) -> list[tuple[bool, str]]:
    """(refused, why) per front-end feature. The engine's are checked where its config is known."""
    count, plugins = args.api_server_count, envs.VLLM_PLUGINS
    stages = args.pipeline_parallel_size
    return [
        (count not in (None, 1), f"--api-server-count {count}; allowed: 1"),
        (args.data_parallel_multi_port_external_lb, "--data-parallel-multi-port-external-lb"),
        # vLLM would refuse it for the engine core's executor, which is not the reason.
        (stages > 1 and not is_off(), f"--pipeline-parallel-size {stages}; allowed: 1"),
        (args.headless, "--headless: admission needs the HTTP server"),
        (args.grpc, "--grpc: admission reads HTTP requests"),
        (envs.VLLM_USE_RUST_FRONTEND, "VLLM_USE_RUST_FRONTEND: admission runs in Python"),
        (
            bool(args.revision),
            f"--revision {args.revision}: fetch that revision and give its directory as the model",
        ),
        (
            bool(args.reasoning_parser),
            f"--reasoning-parser {args.reasoning_parser}: a limit to label words does not hold "
            "while the model reasons",
        ),
        (
            plugins is not None and PLUGIN not in plugins,
            f"VLLM_PLUGINS={','.join(plugins or [])}, which keeps our plug-in from loading; "
            f"add {PLUGIN} or unset it",
        ),
    ]


def with_options(args: Namespace, options: Mapping[str, Any]) -> None:
    """Put the extension's engine options onto the parsed arguments, in place.

    An `--additional-config` of the user's keeps its other entries, and a
    `--distributed-executor-backend` stands. A scheduler or worker class of the user's is refused
    with ServeError: ours cannot share the engine with another.
    """
    for name, value in options.items():
        given = getattr(args, name)
        if name.endswith("_cls") and given not in (None, "auto", value):
            flag = "--" + name.replace("_", "-")
            raise ServeError(f"{flag} {given!r} is given; raee-serve needs its own: {value}")
        if name == "additional_config":
            value = {**(given or {}), **value}
        if name == "distributed_executor_backend" and given is not None:
            value = given
        setattr(args, name, value)


def prefer_native_dtype(args: Namespace) -> None:
    """On a CPU that only emulates bf16 serve float32, several times faster, in place.

    A --dtype that the user gave stands.
    """
    if args.dtype != "auto" or not current_platform.is_cpu():
        return
    if default_dtype(torch.device("cpu")) is torch.float32:
        args.dtype = "float32"
        print(
            "raee-serve: this CPU has no native bf16, so weights are served in float32 "
            "(--dtype overrides)",
            flush=True,
        )


def allow_logprobs(args: Namespace, gate: Gate) -> None:
    """Raise --max-logprobs to the most labels of the gate's tasks, in place.

    One that the user gave stands.
    """
    if not args.max_logprobs_is_given:
        labels = gate.admission.labels.values()
        args.max_logprobs = max([args.max_logprobs, *(len(outputs.names) for outputs in labels)])


def size_kv_cache(args: Namespace) -> int | None:
    """On a CPU give the KV cache memory that is free, in place; bytes for each worker.

    To be called when table and encoder are loaded. None, with nothing changed, where the user said
    how much, and on other devices. Raises RaeeError where there is no room for one.
    """
    if args.kv_cache_is_sized or not current_platform.is_cpu():
        return None
    config = AutoConfig.from_pretrained(args.model).get_text_config()
    item_bytes = 4 if args.dtype in ("float32", "float") else 2
    stored_bytes = getattr(config.dtype, "itemsize", 2)
    length = args.max_model_len or config.max_position_embeddings
    step_tokens = args.max_num_batched_tokens or STEP_TOKENS * args.tensor_parallel_size
    # With several NUMA nodes as if all workers were on the first: vLLM binds each to one.
    node = get_memory_node_info(get_visible_memory_node()[0])
    files = weight_files(Path(args.model))
    args.kv_cache_memory_bytes = kv_cache_bytes(
        Memory(
            total=node.total_memory,
            available=node.available_memory,
            weights=sum(file.stat().st_size for file in files) * item_bytes // stored_bytes,
            longest=longest_request_bytes(config, max(length, 0), item_bytes, step_tokens),
            engines=args.data_parallel_size_local or args.data_parallel_size,
            workers=args.tensor_parallel_size,
        )
    )
    return args.kv_cache_memory_bytes


async def serve(args: Namespace, gate: Gate, watch_table_s: float | None) -> None:
    """Run the server until it is told to stop.

    It listens only once the engine is up; the gate, with encoder and table, is loaded already.
    watch_table_s: seconds between looks at whether the table has changed; None for never.
    Raises ServeError if it stopped untold, because the engine died.
    """
    decorate_logs("APIServer", skip_if_decorated=True)
    signal.signal(signal.SIGTERM, _interrupt)  # until uvicorn's own handler is in place
    # Innermost of the user's: what they let through, and nothing else, costs a look-up.
    args.middleware = [MIDDLEWARE, *args.middleware]
    address, sock = setup_server(args, reuse_port=False)
    try:
        async with build_async_engine_client(args) as engine:
            if gate.lookups is not None:
                _place(gate.lookups, spare_cores(engine.vllm_config))
            await gate.probes.connect(engine.collective_rpc, gate.probe_set)
            client = DepthClient(engine, gate, asyncio.get_running_loop())
            with _watching(gate, watch_table_s):
                stopped = await build_and_serve(cast(EngineClient, client), address, sock, args)
            has_died = engine.errored and not client.is_stopping
        await stopped  # after the engine is gone, as vLLM does
    finally:
        gate.close()
        sock.close()
    if has_died:
        raise ServeError("the engine died; why, its log above says")


@contextmanager
def _watching(gate: Gate, seconds: float | None) -> Iterator[None]:
    if seconds is None or gate.reloader is None:
        yield
        return
    watch = asyncio.create_task(gate.reloader.watch(seconds))
    try:
        yield
    finally:
        watch.cancel()


def _place(lookups: LookupBatcher, cores: Collection[int]) -> None:
    """Keep look-ups off the workers' cores where there are others."""
    if cores:
        lookups.keep_to(cores)
        where = f"keep to core {', '.join(map(str, sorted(cores)))}, which no worker is bound to"
    else:
        where = "run on any core: none is known to be free of the engine's workers"
    print(f"raee-serve: look-ups {where}", flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt("terminated")
