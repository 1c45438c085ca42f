"""`raee-serve table check`: whether a table's rows are sound, and what its index finds."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import RaeeError, TableError
from raee_serve.table.store import ExitTable

DESCRIPTION = """Read all rows of a table: ids, vectors, golds, fits; compare what
its index finds, if it has one, with an exact search for rows of the table themselves, moved a
little. Ends with 1 if anything is wrong."""

UNINDEXED_SHARE = 0.05
"""More rows than this that the index does not cover make every look-up slow."""
AT_ONCE = 16_384
JITTER = 0.3
"""Length of the random vector added to a sampled row, which makes it a query that is no row."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("table", metavar="DIR")
    parser.add_argument("--k", type=int, default=12, help="neighbours to compare (default: 12)")
    parser.add_argument(
        "--samples", type=int, default=200, help="rows to ask for, in all (default: 200)"
    )
    parser.add_argument(
        "--recall",
        type=float,
        default=0.95,
        metavar="R",
        help="least share of the exact neighbours that the index must find (default: 0.95)",
    )


def run(args: Namespace) -> int:
    """1 if anything is wrong. Raises TableError if the table cannot be read at all."""
    if args.k < 1 or args.samples < 1:
        raise RaeeError(f"--k is {args.k} and --samples {args.samples}; allowed: 1 or more")
    table = ExitTable.open(args.table)
    print(f"exit table {args.table}: {table.count_rows():,} rows")
    faults = [*row_faults(table), *index_faults(table, args.k, args.samples, args.recall)]
    for fault in faults:
        print(f"wrong: {fault}")
    print(f"{len(faults)} faults" if faults else "all is well")
    return 1 if faults else 0


def row_faults(table: ExitTable) -> Iterator[str]:
    """What is wrong with the rows, task by task."""
    seen: set[str] = set()
    for name in table.metadata.tasks:
        try:
            ids = table.rows(name, vectors=False).ids
            table.fit(name)
            for _ in table.vectors(name, AT_ONCE):
                pass
        except TableError as e:
            yield str(e)
            continue
        twice = len(ids) - len(set(ids)) + len(seen.intersection(ids))
        seen.update(ids)
        if twice:
            yield f"task {name}: {twice} rows have an id that another row has"
        print(f"{name}: {len(ids):,} rows read")
    if unseen := table.count_unseen():
        print(f"{unseen:,} rows that no reader sees, of replacements that were not finished")


def index_faults(table: ExitTable, k: int, samples: int, least_recall: float) -> Iterator[str]:
    """What is wrong with the index; a table without one needs none until it is large."""
    index, num_rows = table.index, table.count_rows()
    if index.kind is None:
        print("no index (only a table larger than serve's --rows-in-memory needs one)")
        return
    print(f"index: {index.kind}, {index.unindexed_rows:,} rows not in it")
    if index.unindexed_rows > UNINDEXED_SHARE * num_rows:
        yield f"{index.unindexed_rows:,} of {num_rows:,} rows are not in the index; make it anew"
    tasks = [name for name in table.metadata.tasks if table.count(name)]
    for name in tasks:
        try:
            found = measure_recall(table, name, k, max(1, samples // len(tasks)))
        except TableError as e:
            yield str(e)
            continue
        print(f"{name}: recall@{k} {found:.3f}")
        if found < least_recall:
            yield f"task {name}: recall@{k} is {found:.3f}, less than {least_recall:g}"


def measure_recall(table: ExitTable, task: str, k: int, samples: int) -> float:
    """Share of the exact k nearest rows of a task that the index finds, for queries near rows."""
    return recall(table, task, _queries(table, task, samples), k)


def recall(table: ExitTable, task: str, queries: NDArray[np.float32], k: int) -> float:
    """Share of the exact k nearest rows of a task that the index finds. queries: [n, dimension]."""
    exact = table.index.nearest([task], queries, k, exact=True)
    found = table.index.nearest([task], queries, k)
    shares = [
        len(np.intersect1d(keys, others)) / len(keys)
        for (keys, _), (others, _) in zip(exact, found, strict=True)
    ]
    return float(np.mean(shares))


def _queries(table: ExitTable, task: str, samples: int) -> NDArray[np.float32]:
    """[n, dimension]: some rows' vectors, drawn once and moved a little."""
    rng = np.random.default_rng(0)
    wanted = np.sort(rng.permutation(table.count(task))[:samples])
    first, chosen = 0, []
    for block in table.vectors(task, AT_ONCE):
        begin, end = np.searchsorted(wanted, [first, first + len(block)])
        chosen.append(block[wanted[begin:end] - first])
        first += len(block)
    rows = np.concatenate(chosen)
    noise = rng.normal(size=rows.shape)
    moved = rows + JITTER * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)
