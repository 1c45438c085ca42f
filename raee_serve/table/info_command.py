"""`raee-serve table info`: what an exit table holds and what it is bound to."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from raee_serve.records import EXIT_HEADS
from raee_serve.table.evidence import evidence_of, free_text_quality, kept_quality
from raee_serve.table.schema import TaskEntry
from raee_serve.table.store import ExitTable


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("table", metavar="DIR")


def run(args: Namespace) -> None:
    print("\n".join(describe(args.table)))


def describe(uri: str) -> Iterator[str]:
    """Lines for a reader. Raises TableError if the table is missing or corrupt."""
    table = ExitTable.open(uri)
    metadata = table.metadata
    yield f"exit table {uri}: {table.count_rows()} rows, {table.size_bytes() / 1e6:.1f} MB"
    yield f"version    {table.version}"
    yield f"backbone   {metadata.backbone}"
    yield f"encoder    {metadata.encoder}"
    yield f"metric     {metadata.metric}"
    if unseen := table.count_unseen():
        yield f"unseen     {unseen} rows of a replacement that has not been finished"
    for entry in metadata.tasks.values():
        yield ""
        yield from _describe_task(table, entry)


def _describe_task(table: ExitTable, entry: TaskEntry) -> Iterator[str]:
    rows = table.rows(entry.name)
    answers = ", ".join(entry.label_words) or "free text"
    yield f"{entry.name}: {len(rows)} rows, template {entry.version}, {answers}"
    if choice := table.metadata.choices.get(entry.name):
        yield f"  calibrated: {choice}"
    if len(rows):
        evidence = evidence_of(rows, entry, table.metadata.backbone.num_layers)
        right = (evidence > 0).mean(axis=0)
        rates = "  ".join(f"{layer}: {right[layer - 1]:.0%}" for layer in entry.layers)
        yield f"  rows answered correctly at layer  {rates}"
    if len(rows) and entry.kind == "free-text":
        quality = free_text_quality(rows, entry, table.metadata.backbone.num_layers)
        kept = kept_quality(quality)
        for head, layers, shares in zip(
            EXIT_HEADS, (entry.layers, entry.shortcut_layers), kept, strict=True
        ):
            if layers:
                rates = "  ".join(f"{layer}: {shares[layer - 1]:.0%}" for layer in layers)
                yield f"  quality kept by the {head} head at layer  {rates}"
