"""`raee-serve preview`: what would be decided for a prompt, without an engine."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

NEIGHBOURS_SHOWN = 5
BAR = 40
"""Characters of the longest bar."""

DESCRIPTION = """Look prompts up in an exit table as a server of MODEL would, and say what was
decided and why. The output counts as limited to the task's labels when --task names it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--table", metavar="DIR", required=True, help="exit table")
    parser.add_argument("--model", required=True, help="the backbone, as for serve")
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="repeat for several"
    )
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is the user message of a chat"
    )
    parser.add_argument("--task", help="name the task instead of recognising it by its template")
    parser.add_argument("--encoder", help="name or directory of the table's encoder, if moved")
    parser.add_argument("--k", type=int, help="neighbours to look up")
    parser.add_argument("--head", help="what answers a label task: probe or plain")
    parser.add_argument(
        "--budget", type=float, help="share of the best exit's expected quality that is to be kept"
    )
    parser.add_argument("--shortcuts-file", metavar="FILE", help="exit shortcuts, as for serve")
    parser.add_argument(
        "--exit-points",
        default="any",
        metavar="LAYERS",
        help="as for serve; a server on CUDA takes auto by default (default: any)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")


def run(args: argparse.Namespace) -> None:
    """Decide and print. Raises RaeeError for a table, model or option that does not fit."""
    for prompt, decided in asyncio.run(_previews(args)):
        print(json.dumps(decided) if args.json else "\n".join(_report(prompt, decided)))


async def _previews(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Each prompt with its part of the `raee` object, see `explain.raee_object`."""
    from prometheus_client import CollectorRegistry

    from raee_serve.checkpoints import local_checkpoint
    from raee_serve.fingerprint import identify_backbone
    from raee_serve.retrieval.points_command import points_named
    from raee_serve.server.explain import raee_object
    from raee_serve.server.loading import load_gate
    from raee_serve.server.prompts import Kind
    from raee_serve.server.settings import DepthSettings

    checkpoint = Path(local_checkpoint(args.model))
    patient = DepthSettings(
        args.table,
        encoder=args.encoder,
        lookup_timeout_ms=60_000,
        shortcuts_file=args.shortcuts_file,
        exit_points=points_named(args.exit_points, args.table),
    )
    with redirect_stdout(sys.stderr):  # what is loaded is not part of the answer
        gate = load_gate(
            patient, identify_backbone(checkpoint), checkpoint, [], registry=CollectorRegistry()
        )
    raee = {"task": args.task, "k": args.k, "head": args.head, "budget": args.budget}
    kind: Kind = "chat" if args.chat else "completions"
    found = []
    for prompt in args.prompt:
        message = {"role": "user", "content": prompt}
        asked = {"messages": [message]} if args.chat else {"prompt": prompt}
        admitted = await gate.preview(kind, asked | {"raee": raee})
        assert admitted is not None, "one prompt, and a text"
        [decided] = raee_object(admitted.decisions, gate.table_version)["prompts"]
        found.append((prompt, decided))
    gate.close()
    return found


def _report(prompt: str, decided: dict[str, Any]) -> Iterator[str]:
    """Lines for a reader."""
    yield ""
    yield repr(prompt)
    yield (
        f"  {decided['exit_layer']} of {decided['num_layers']} layers, head {decided['head']}: "
        f"{decided['reason']}, task {decided['task'] or '-'}"
    )
    if "choice" not in decided:
        return
    yield "  " + ", ".join(f"{name} {value:g}" for name, value in decided["choice"].items())
    for neighbour in decided["neighbours"][:NEIGHBOURS_SHOWN]:
        yield f"  at {neighbour['distance']:.4f}  {neighbour['id']}"
    for head, shares in decided["expected"].items():
        yield f"  expected by layer, {head} head:"
        yield from _bars(shares, decided["exit_layer"] if head == decided["head"] else 0)


def _bars(scores: list[float], chosen: int) -> Iterator[str]:
    longest = max(scores) or 1.0
    for layer, score in enumerate(scores, 1):
        mark = "*" if layer == chosen else " "
        yield f"  {mark}{layer:3} {score:8.3f} {'#' * round(BAR * score / longest)}".rstrip()
