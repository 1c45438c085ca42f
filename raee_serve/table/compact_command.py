"""`raee-serve table compact`: merge small files and drop old versions."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from datetime import timedelta

from raee_serve.errors import RaeeError
from raee_serve.table.store import ExitTable
from raee_serve.table.versions import KEEP


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("table", metavar="DIR")
    parser.add_argument(
        "--keep-days",
        type=float,
        default=KEEP / timedelta(days=1),
        metavar="D",
        help="states that the table had within D days can still be rolled back to (default: "
        "%(default)g); with 0 no other process may be using the table",
    )


def run(args: Namespace) -> None:
    if not 0 <= args.keep_days <= 36500:
        raise RaeeError(f"--keep-days is {args.keep_days:g}; allowed: 0..36500")
    table = ExitTable.open(args.table)
    table.compact(timedelta(days=args.keep_days))
    print(f"compacted: {len(table.history())} versions, {table.size_bytes() / 1e6:.1f} MB in use")
