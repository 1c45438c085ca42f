"""`raee-serve table rollback`: make an old version of an exit table the present one."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from raee_serve.table.store import ExitTable


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("table", metavar="DIR")
    parser.add_argument(
        "--to", type=int, required=True, metavar="VERSION", help="as `table history` lists them"
    )


def run(args: Namespace) -> None:
    table = ExitTable.open(args.table)
    table.rollback(args.to)
    print(f"version {table.version} is version {args.to} again: {table.count_rows()} rows")
