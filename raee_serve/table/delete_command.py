"""`raee-serve table delete`: remove rows from an exit table."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from raee_serve.errors import RaeeError
from raee_serve.table.build import complete
from raee_serve.table.store import ExitTable

STDIN = "-"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("table", metavar="DIR")
    parser.add_argument("--id", action="append", default=[], help="repeat for several")
    parser.add_argument("--ids", metavar="FILE", help="file of one id a line; '-' reads stdin")


def run(args: Namespace) -> None:
    """Delete all of them or, if one is not there, none; then fit the rows that are left."""
    ids = [*args.id, *(_listed(args.ids) if args.ids else [])]
    if not ids:
        raise RaeeError("no row ids given; use --id ID or --ids FILE")
    table = ExitTable.open(args.table)
    touched = [name for name in table.metadata.tasks if not table.row_ids(name).isdisjoint(ids)]
    table.delete_rows(ids)
    for name in touched:
        if table.count(name) and name in table.metadata.built:
            complete(table, name)
    print(f"deleted {len(set(ids))} rows; {table.count_rows()} rows left, version {table.version}")


def _listed(source: str) -> list[str]:
    try:
        text = sys.stdin.read() if source == STDIN else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise RaeeError(f"cannot read row ids from {source}: {e}") from e
    return text.split()
