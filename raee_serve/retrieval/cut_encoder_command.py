"""`raee-serve encoder cut`: an encoder of fewer layers, for cheaper look-ups."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from raee_serve.errors import RaeeError
from raee_serve.retrieval.cut_encoder import cut_encoder
from raee_serve.tasks.datasets import add_data_argument, shuffled_examples
from raee_serve.tasks.registry import add_task_argument, get_tasks

DESCRIPTION = """Write a sentence-transformers model of the first layers of another one, with a
linear map to the vectors that all layers would give, fitted on training texts of the tasks. Pass
its directory as --encoder to `build`, or to `table reencode` for a table that is there."""
SEED = 0


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--encoder", default="minilm", help="packaged name, directory or hub id")
    parser.add_argument("--layers", required=True, type=int, metavar="N", help="that are left")
    add_task_argument(parser)
    parser.add_argument(
        "--limit", type=int, default=2000, metavar="N", help="texts a task (default: 2000)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="must not exist")
    add_data_argument(parser)


def run(args: Namespace) -> None:
    if args.out.exists():
        raise RaeeError(f"--out {args.out} exists; name a directory that does not")
    if args.limit < 1:
        raise RaeeError(f"--limit {args.limit} is not allowed, it must be at least 1")
    texts = [
        example.text
        for task in get_tasks(args.task)
        for example in shuffled_examples(task, "train", args.data, SEED)[: args.limit]
    ]
    report = cut_encoder(args.encoder, args.layers, texts, args.out)
    print(f"raee-serve: {args.encoder}: {report}; written to {args.out}")
