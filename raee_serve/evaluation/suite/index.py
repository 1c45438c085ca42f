"""What an approximate index costs in accuracy, and saves in time."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from raee_serve.errors import TableError
from raee_serve.evaluation.suite.findings import Findings, Picture, Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.scores import averaged, decided, timed
from raee_serve.table.check_command import recall
from raee_serve.table.index import KINDS
from raee_serve.table.store import ExitTable

QUESTION = "What do LanceDB's indexes cost in accuracy, and what do they save?"
RULE, K = "stacked", 12
ASKED = 100
"""Prompts a task of which recall is taken."""


def run(material: Material) -> Findings:
    everything = {task.name: material.rows(task) for task in material.tasks}
    rows: list[Row] = []
    notes = []
    for kind in tqdm(("exact", *KINDS), desc="index", unit="index"):
        table = material.table_of(everything)
        before, built = table.size_bytes(), 0.0
        if kind != "exact":
            start = time.perf_counter()
            try:
                table.build_index(kind)
            except TableError as e:
                notes.append(f"{kind}: {e}")
                continue
            built = time.perf_counter() - start
        options: dict[str, Any] = {} if kind == "exact" else {"rows_in_memory_mb": 0.0}
        retriever = material.retriever_of(table, **options)
        way, ms = timed(partial(decided, material, retriever, RULE))
        rows.append(
            {
                "index": kind,
                **averaged(material, way),
                "recall": 1.0 if kind == "exact" else _recall(material, table),
                "ms": ms,
                "build_s": round(built, 2),
                "index_mb": round((table.size_bytes() - before) / 2**20, 2),
            }
        )
    notes.append(
        f"{sum(map(len, everything.values())):,} rows, rule {RULE}; recall@{K} against exact "
        "search; ms: search and aggregation of a prompt, 256 at once. Exact search holds all "
        "vectors in memory."
    )
    return Findings(rows, Picture("ms", "recall", "index", joined=False), notes)


def _recall(material: Material, table: ExitTable) -> float:
    """Mean over the tasks, of the first prompts of each."""
    shares = [
        recall(table, task.name, material.asked(task).vectors[:ASKED], K) for task in material.tasks
    ]
    return round(float(np.mean(shares)), 4)
