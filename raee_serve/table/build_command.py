"""`raee-serve build`: build an exit table for a backbone."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from raee_serve.checkpoints import local_checkpoint
from raee_serve.errors import RaeeError, TableError
from raee_serve.fingerprint import identify_backbone
from raee_serve.retrieval.encoder import Encoder
from raee_serve.shortcuts import Shortcuts, stored_shortcuts
from raee_serve.table.build import DEFAULT_BATCH_TOKENS, TaskBuilder, finish_task, plan_task
from raee_serve.table.probe import DTYPES, LayerProbe
from raee_serve.table.rows import MOST_PROBES
from raee_serve.table.schema import TableMetadata
from raee_serve.table.shortcuts import DEFAULT_TOKENS, default_layers
from raee_serve.table.shortcuts_command import add_file_argument, fit_and_store, target_file
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import (
    Example,
    add_data_argument,
    add_words_argument,
    load,
    shuffled,
)
from raee_serve.tasks.registry import add_task_argument, get_tasks
from raee_serve.tasks.task import Task


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="packaged name, checkpoint directory or hub id"
    )
    add_task_argument(parser)
    parser.add_argument("--table", required=True, metavar="DIR", help="new, or to be added to")
    add_data_argument(parser)
    add_words_argument(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="rows a task (default: all)")
    parser.add_argument("--encoder", default="minilm", help="packaged name, directory or hub id")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=DEFAULT_BATCH_TOKENS,
        metavar="TOKENS",
        help="padded tokens of a batch (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the backbone's weights")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle before --limit")
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="encode and probe over a Ray cluster: the one at host:port (or ray://host:port), or a "
        "new one on this machine",
    )
    parser.add_argument(
        "--ray-workers",
        type=int,
        metavar="N",
        help="workers that hold the backbone (default: one per GPU, or as the CPUs allow)",
    )
    parser.add_argument(
        "--probe-layers",
        type=int,
        default=MOST_PROBES,
        metavar="N",
        help="layers that get a probe, at even distances (default: %(default)s, or all)",
    )
    parser.add_argument("--store-text", action="store_true", help="keep the texts in the table")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="swap the tasks' rows for these, at once when a task is finished; a changed template "
        "or other shortcuts need it",
    )
    parser.add_argument(
        "--shortcuts",
        action="store_true",
        help="where the table has no exit shortcuts yet, fit them on the free-text tasks' text "
        "first, as `raee-serve shortcuts fit` does; what is there is used in any case",
    )
    add_file_argument(parser)


def run(args: Namespace) -> None:
    if args.limit is not None and args.limit < 1:
        raise RaeeError(f"--limit {args.limit} is not allowed, it must be at least 1")
    if args.batch_size < 1:
        raise RaeeError(f"--batch-size {args.batch_size} is not allowed, it must be at least 1")
    if args.probe_layers < 1:
        raise RaeeError(f"--probe-layers {args.probe_layers} is not allowed, it must be at least 1")
    # Everything cheap that can fail comes before the backbone is loaded.
    tasks = get_tasks(args.task)
    # The same rows for the same seed and limit, and more of the same for a higher limit.
    texts = [(task, _texts(task, args)) for task in tasks]
    work = [(task, rows[: args.limit]) for task, rows in texts]
    if args.shortcuts and not any(task.kind == "free-text" for task, _ in work):
        raise RaeeError("--shortcuts needs a free-text task among those that are built")
    if args.shortcuts and args.ray:
        raise RaeeError("--shortcuts does not go with --ray; run raee-serve shortcuts fit before")
    if args.ray_workers is not None and (args.ray_workers < 1 or not args.ray):
        raise RaeeError(f"--ray-workers {args.ray_workers} must be at least 1, and goes with --ray")
    checkpoint = local_checkpoint(args.model)
    encoder = Encoder(args.encoder, threads=torch.get_num_threads())
    backbone = identify_backbone(checkpoint)
    table = ExitTable.open_or_create(args.table, TableMetadata(backbone, encoder.identity()))
    if not args.replace:
        for task, _ in work:
            table.metadata.check_task(task, args.table)
    target = target_file(args.table, args.shortcuts_file) if args.shortcuts else None
    is_new = target is not None and not target.is_file()
    maps = None if is_new else stored_shortcuts(args.table, args.shortcuts_file, backbone)
    if args.ray:
        _run_over_cluster(args, work, table, str(checkpoint), maps)
        _compact(table)
        return
    probe = LayerProbe(checkpoint, DTYPES[args.dtype], maps)
    if target is not None and maps is None:
        free_text = [(task, rows) for task, rows in texts if task.kind == "free-text"]
        layers = default_layers(backbone.num_layers)
        probe.shortcuts = fit_and_store(probe, backbone, free_text, layers, DEFAULT_TOKENS, target)
    for task, examples in work:
        builder = TaskBuilder(
            task,
            table,
            probe,
            encoder,
            batch_tokens=args.batch_size,
            store_text=args.store_text,
            replace=args.replace,
            probe_layers=args.probe_layers,
        )
        print(builder.build(examples), flush=True)
    _compact(table)


def _texts(task: Task, args: Namespace) -> list[Example]:
    """All training examples, shuffled; says how many rows have no text."""
    loaded = load(task, "train", args.data)
    if loaded.blank:
        print(f"{task.name}: rows left out for want of a text: {loaded.blank:,}", flush=True)
    return shuffled(loaded.examples, args.seed, args.words)


def _compact(table: ExitTable) -> None:
    try:
        table.compact()
    except TableError as e:  # the rows are in; another builder that is at work compacts later
        print(f"raee-serve build: not compacted: {e}", flush=True)


def _run_over_cluster(
    args: Namespace,
    work: Sequence[tuple[Task, list[Example]]],
    table: ExitTable,
    checkpoint: str,
    shortcuts: Shortcuts | None,
) -> None:
    from raee_serve.table import ray_build

    backbone = ray_build.ReadBackbone(checkpoint, shortcuts)
    plans = [
        plan_task(
            task,
            table,
            backbone,
            rows,
            args.batch_size,
            replace=args.replace,
            probe_layers=args.probe_layers,
        )
        for task, rows in work
    ]
    names = (_wherever(args.model), _wherever(args.encoder))
    models = ray_build.Models(*names, DTYPES[args.dtype], table.metadata, shortcuts)
    with ray_build.cluster(args.ray) as resources:
        pools = ray_build.Pools.of(resources, args.ray_workers)
        print(f"raee-serve: {pools.probe} Ray workers probe, up to {pools.encode} encode")
        ray_build.build_over_cluster(table, plans, models, pools, store_text=args.store_text)
    for plan in plans:
        finish_task(table, plan)
        line = f"{plan.entry.name}: {plan.added} rows added, {plan.kept} kept"
        print(line + (f", {plan.truncated} prompts truncated" if plan.truncated else ""))


def _wherever(name: str) -> str:
    """A directory by its full path, for processes that run in another one; else as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name
