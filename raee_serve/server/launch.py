"""`raee-serve serve MODEL --table DIR [any vllm serve flag]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raee_serve.errors import RaeeError
from raee_serve.retrieval.resources import DEFAULT_BACKEND, ROWS_IN_MEMORY_MB
from raee_serve.server import access, valves
from raee_serve.server.memory import GIB
from raee_serve.server.settings import LOOKUP_TIMEOUT_MS, DepthSettings

if TYPE_CHECKING:
    from raee_serve.fingerprint import BackboneIdentity
    from raee_serve.server.gate import Gate

DESCRIPTION = """Serve MODEL through vLLM's OpenAI server, each prompt at the depth that an exit
table predicts for it. Flags not listed here are those of `vllm serve` (`vllm serve --help=all`).
MODEL is a packaged model (smollm2-135m, gemma3-270m), a checkpoint directory or a hub id."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that are ours. The rest of the command line, MODEL included, is vLLM's."""
    parser.description = DESCRIPTION
    parser.usage = "raee-serve serve MODEL (--table DIR | --exit-layer N) [any vllm serve flag]"
    parser.allow_abbrev = False  # else a vLLM flag could pass for the beginning of one of ours
    parser.add_argument("--table", metavar="DIR", help="exit table, from raee-serve build")
    parser.add_argument(
        "--exit-layer", metavar="N|full", help="one depth for all requests, instead of a table"
    )
    parser.add_argument("--encoder", help="name or directory of the table's encoder, if moved")
    parser.add_argument(
        "--encoder-backend",
        default=DEFAULT_BACKEND,
        metavar="NAME",
        help="what runs the encoder: torch, onnx, or onnx-int8, which is the fastest and not quite "
        "exact (default: %(default)s)",
    )
    parser.add_argument(
        "--rows-in-memory",
        type=float,
        default=ROWS_IN_MEMORY_MB,
        metavar="MB",
        help="hold the table's vectors in memory up to this size; a larger table is searched "
        "through its index (raee-serve table index) (default: %(default)g)",
    )
    parser.add_argument("--k", type=int, help="neighbours to look up")
    parser.add_argument(
        "--head",
        metavar="NAME",
        help="what answers label tasks: probe, a classifier that build fitted to the layer, or "
        "plain, the model's own LM head, as in the paper (default: probe where there is one)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="X",
        help="take the shallowest exit whose expected quality is at least this share of the best "
        "exit's (default: as calibrated, for each task)",
    )
    parser.add_argument(
        "--shortcuts-file",
        metavar="FILE",
        help="exit shortcuts (default: those in the table's directory, if there are any)",
    )
    parser.add_argument(
        "--max-distance",
        type=float,
        metavar="D",
        help="mean cosine distance of the nearest rows beyond which a prompt runs at full depth "
        "(default: per task, from the table)",
    )
    parser.add_argument(
        "--lookup-timeout-ms",
        type=float,
        default=LOOKUP_TIMEOUT_MS,
        metavar="MS",
        help="a prompt whose look-up takes longer runs at full depth (default: %(default).0f)",
    )
    parser.add_argument(
        "--watch-table",
        type=float,
        metavar="SECONDS",
        help="take up the table's new versions, looking for one every so often (default: only "
        "when asked to, by POST /v1/raee/reload)",
    )
    parser.add_argument(
        "--exit-points",
        metavar="N,N,...|auto|any",
        help="layers at which exits are decided, full depth among them; CUDA graphs are captured "
        "between them. auto chooses some by the exits of the table's rows (raee-serve table "
        "points) (default: auto on CUDA with a table, else any)",
    )
    parser.add_argument(
        "--kv-segments",
        default="auto",
        metavar="N|auto",
        help="split the layers into N segments, of which a request holds only as many KV blocks "
        "as it reaches; 1 is vLLM's own KV cache (default: auto, N is taken from the model)",
    )
    valves.add_arguments(parser)
    access.add_arguments(parser)


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Load table and encoder, start the engine, serve. Raises RaeeError for what cannot work."""
    from raee_serve.engine.settings import is_off

    neither = args.table is None and args.exit_layer is None
    settings = DepthSettings(
        table=args.table,
        exit_layer="full" if neither and is_off() else args.exit_layer,
        encoder=args.encoder,
        k=args.k,
        head=args.head,
        budget=args.budget,
        max_distance=args.max_distance,
        lookup_timeout_ms=args.lookup_timeout_ms,
        watch_table=args.watch_table,
        encoder_backend=args.encoder_backend,
        rows_in_memory_mb=args.rows_in_memory,
        shortcuts_file=args.shortcuts_file,
    )
    settings = replace(settings, exit_points=_exit_points(args.exit_points, settings))
    safety, surface = valves.Valves.of(args), access.Access.of(args)
    options = _engine_options(args, settings)
    import uvloop

    from raee_serve.server import vllm_server

    vllm_server.prepare_environment()
    serve_args = vllm_server.parse_serve_args(rest)
    vllm_server.with_options(serve_args, options)
    vllm_server.prefer_native_dtype(serve_args)
    name, backbone = serve_args.model_tag, _backbone(serve_args)
    gate = _gate(serve_args, backbone, settings, safety, surface)
    vllm_server.allow_logprobs(serve_args, gate)
    _tell(name, backbone, vllm_server.size_kv_cache(serve_args))
    uvloop.run(vllm_server.serve(serve_args, gate, settings.watch_table))


def _tell(name: str, backbone: BackboneIdentity, kv_cache_bytes: int | None) -> None:
    size = f", KV cache {kv_cache_bytes / GIB:.1f} GiB" if kv_cache_bytes else ""
    layers = f"{backbone.architecture}, {backbone.num_layers} layers"
    print(f"raee-serve: backbone {name} ({layers}){size}", flush=True)


def _exit_points(asked: str | None, settings: DepthSettings) -> tuple[int, ...]:
    """What `--exit-points` asks for; none for any layer. Raises RaeeError for what is not one."""
    from raee_serve.engine.settings import is_off, on_cuda
    from raee_serve.retrieval.points_command import points_named

    if is_off():
        return ()
    if asked is None:
        asked = "auto" if on_cuda() and settings.table is not None else "any"
    fixed = settings.exit_layer or ""
    if asked == "any" and fixed.isdecimal():
        return (int(fixed),)
    return points_named(asked, settings.table)


def _engine_options(args: argparse.Namespace, settings: DepthSettings) -> dict[str, Any]:
    from raee_serve.engine.segments import parse_count
    from raee_serve.engine.settings import engine_options
    from raee_serve.shortcuts import find_shortcuts

    shortcuts = find_shortcuts(settings.table, settings.shortcuts_file)
    try:
        return engine_options(
            parse_count(args.kv_segments), shortcuts, settings.exit_points or None
        )
    except ValueError as error:
        raise RaeeError(f"--kv-segments: {error}") from error


def _backbone(serve_args: argparse.Namespace) -> BackboneIdentity:
    """Resolve MODEL in place, so that what is served is what the table is checked against."""
    from raee_serve.checkpoints import local_checkpoint
    from raee_serve.fingerprint import identify_backbone

    name = serve_args.model_tag
    checkpoint = local_checkpoint(name)
    serve_args.model = serve_args.model_tag = str(checkpoint)
    serve_args.served_model_name = serve_args.served_model_name or [name]
    return identify_backbone(checkpoint)


def _gate(
    serve_args: argparse.Namespace,
    backbone: BackboneIdentity,
    settings: DepthSettings,
    safety: valves.Valves,
    surface: access.Access,
) -> Gate:
    from raee_serve.server.loading import load_gate

    return load_gate(
        settings,
        backbone,
        Path(serve_args.tokenizer or serve_args.model),
        serve_args.served_model_name,
        safety,
        surface,
        chat_template=serve_args.chat_template,
    )
