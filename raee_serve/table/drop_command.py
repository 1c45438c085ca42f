"""`raee-serve table drop`: remove tasks from an exit table."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from raee_serve.table.store import ExitTable


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("table", metavar="DIR")
    parser.add_argument("--task", required=True, action="append", help="repeat for several")


def run(args: Namespace) -> None:
    table = ExitTable.open(args.table)
    for name in dict.fromkeys(args.task):
        table.drop_task(name)
        print(f"dropped {name}; {table.count_rows()} rows left, version {table.version}")
