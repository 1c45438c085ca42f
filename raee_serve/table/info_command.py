"""`raee-serve table info`: what an exit table holds and what it is bound to."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from raee_serve.exits.shrinkage import kept_quality
from raee_serve.records import EXIT_HEADS
from raee_serve.table.evidence import free_text_quality
from raee_serve.table.schema import TaskEntry, TaskRows, shortened
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
    rows, built = table.rows(entry.name), table.metadata.built.get(entry.name)
    answers = shortened(entry.labels) or "free text"
    yield f"{entry.name}: {len(rows)} rows, template {entry.version}, {answers}"
    if built is None:
        yield "  its build has not finished, so nobody is served by it"
    elif built.no_fit and entry.kind == "labels":
        yield f"  no probes: {built.no_fit}"
    if choice := table.metadata.choices.get(entry.name):
        yield f"  calibrated: {choice}"
    if fit := table.fit(entry.name):
        yield f"  probes {fit.digest}, rows answered correctly (out of fold) at layer"
        right = zip(fit.layers, fit.is_right.mean(axis=0), strict=True)
        yield "  " + "  ".join(f"{layer}: {share:.0%}" for layer, share in right)
    if len(rows) and entry.kind == "free-text":
        yield from _describe_quality(rows, entry, table.metadata.backbone.num_layers)


def _describe_quality(rows: TaskRows, entry: TaskEntry, num_layers: int) -> Iterator[str]:
    kept = kept_quality(free_text_quality(rows, entry, num_layers))
    for head, layers, shares in zip(
        EXIT_HEADS, (entry.layers, entry.shortcut_layers), kept, strict=True
    ):
        if layers:
            rates = "  ".join(f"{layer}: {shares[layer - 1]:.0%}" for layer in layers)
            yield f"  quality kept by the {head} head at layer  {rates}"
