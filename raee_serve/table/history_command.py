"""`raee-serve table history`: the versions of an exit table."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from raee_serve.table.store import ExitTable


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("table", metavar="DIR")


def run(args: Namespace) -> None:
    """One line a version, the present one last."""
    print(f"{'version':>7}  {'time':19}  {'rows':>8}  change")
    for version in ExitTable.open(args.table).history():
        time = f"{version.time:%Y-%m-%d %H:%M:%S}"
        print(f"{version.number:7}  {time}  {version.rows:8}  {version.what}")
