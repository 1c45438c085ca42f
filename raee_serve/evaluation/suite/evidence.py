"""Which rows' exit information is worth having."""

from __future__ import annotations

import numpy as np

from raee_serve.evaluation.suite.findings import Findings, Picture, Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.scores import averaged, decided
from raee_serve.table.schema import TaskRows

QUESTION = "Should a table hold the prompts that full depth answers correctly, or the others?"
RULES = ("published", "earliest", "stacked")
KINDS = ("all rows", "answered correctly at full depth", "answered wrongly at full depth")
LEAST = 20
"""Rows of a kind below which a task says nothing of it."""


def run(material: Material) -> Findings:
    """Every kind is cut to as many rows a task as the rarest has, so that only the kind differs."""
    parts = {task.name: _kinds(material.rows(task)) for task in material.tasks}
    sizes = {name: min(map(len, kinds)) for name, kinds in parts.items()}
    tasks = [task for task in material.tasks if sizes[task.name] >= LEAST]
    rows: list[Row] = []
    for position, kind in enumerate(KINDS if tasks else ()):
        rng = np.random.default_rng(material.source.seed)
        chosen = {
            task.name: material.rows(task).at(
                np.sort(rng.permutation(parts[task.name][position])[: sizes[task.name]])
            )
            for task in tasks
        }
        largest = round(float(np.mean([_largest_share(own) for own in chosen.values()])), 4)
        retriever = material.retriever(chosen)
        for rule in RULES:
            way = decided(material, retriever, rule, tasks=tasks)
            figures = averaged(material, way)
            rows.append({"rows": kind, "largest label": largest, "rule": rule, **figures})
    left_out = sorted({task.name for task in material.tasks} - {task.name for task in tasks})
    counts = ", ".join(f"{task.name} {sizes[task.name]}" for task in tasks)
    notes = [
        f"Rows of each kind: {counts}.",
        "largest label: the share of a task's rows that have its most frequent label, mean over "
        "the tasks.",
    ]
    if left_out:
        notes.append(f"Left out, with fewer than {LEAST} rows of a kind: {', '.join(left_out)}.")
    picture = Picture("depth", "accuracy", "rows", ("low", "high"), joined=False)
    return Findings(rows or [{"rows": "too few of any kind"}], picture, notes)


def _kinds(rows: TaskRows) -> list[np.ndarray]:
    """Positions of the rows of each of KINDS."""
    assert rows.golds is not None and rows.label_logprobs is not None
    right = rows.label_logprobs[:, -1].argmax(axis=1) == rows.golds
    return [np.arange(len(rows)), np.flatnonzero(right), np.flatnonzero(~right)]


def _largest_share(rows: TaskRows) -> float:
    assert rows.golds is not None
    return float(np.bincount(rows.golds).max() / len(rows))
