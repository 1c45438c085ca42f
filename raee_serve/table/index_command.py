"""`raee-serve table index`: index a table's vectors, so that they need not be held in memory."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace

from raee_serve.errors import TableError
from raee_serve.table.index import KINDS, kind_for
from raee_serve.table.store import ExitTable

DESCRIPTION = """Make or replace the LanceDB index through which `serve` searches a table whose
vectors exceed --rows-in-memory. Rows added later are found too, but one by one: make it anew when
they are many. `raee-serve table check` measures how many neighbours it finds."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("table", metavar="DIR")
    parser.add_argument("--kind", choices=KINDS, help="default: what suits the number of rows")


def run(args: Namespace) -> None:
    """Raises TableError if the table is missing, corrupt or empty."""
    table = ExitTable.open(args.table)
    num_rows = table.count_rows()
    if not num_rows:
        raise TableError(f"exit table {args.table} holds no rows to index")
    kind = args.kind or kind_for(num_rows)
    print(f"raee-serve: indexing {num_rows:,} rows of {args.table} ({kind}) ...", flush=True)
    start = time.perf_counter()
    table.build_index(kind)
    print(f"raee-serve: done in {time.perf_counter() - start:.1f} s")
