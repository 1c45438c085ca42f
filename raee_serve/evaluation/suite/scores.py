"""One line of figures for what a way to answer makes of all tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from raee_serve.evaluation.baselines import Answers
from raee_serve.evaluation.metrics import MATTHEWS_TASKS, score_labels
from raee_serve.evaluation.offline import answers
from raee_serve.evaluation.suite.findings import Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.table.task import Task

DRAWS = 10_000
"""Resamples for an interval."""


def averaged(material: Material, way: Mapping[str, Answers]) -> Row:
    """accuracy: mean over the tasks that are scored by it, with the bootstrap 95% interval over
    their prompts; depth: mean over the same tasks.

    way: answers by task, to all of its prompts or to the first ones.
    """
    counted = tasks_averaged([task for task in material.tasks if task.name in way])
    rng = np.random.default_rng(0)
    means, resampled = [], np.zeros(DRAWS)
    for task in counted:
        predicted = way[task.name].predicted
        golds = material.asked(task).golds[: len(predicted)]
        own = float((predicted == golds).mean())
        means.append(own)
        resampled += rng.binomial(len(golds), own, DRAWS) / len(golds)
    low, high = np.quantile(resampled / len(counted), [0.025, 0.975])
    depth = float(np.mean([way[task.name].depth for task in counted]))
    return {
        "accuracy": round(float(np.mean(means)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "depth": round(depth, 4),
    }


def tasks_averaged(tasks: Sequence[Task]) -> Sequence[Task]:
    """Those scored by accuracy; all of them where there is none."""
    return [task for task in tasks if task.name not in MATTHEWS_TASKS] or tasks


def by_task(material: Material, way: Mapping[str, Answers]) -> Row:
    """Each task's own score: accuracy, for cola Matthews correlation."""
    return {
        task.name: round(
            score_labels(
                task, way[task.name].predicted.tolist(), material.asked(task).golds.tolist()
            ),
            4,
        )
        for task in material.tasks
        if task.name in way
    }


def decided(
    material: Material,
    retriever: ExitRetriever,
    rule: str,
    k: int | None = None,
    tasks: Sequence[Task] | None = None,
) -> dict[str, Answers]:
    """What the server would answer to each task's prompts."""
    return {
        task.name: answers(retriever, task, material.asked(task), rule, k)
        for task in tasks or material.tasks
    }


def timed(work: Callable[[], dict[str, Answers]]) -> tuple[dict[str, Answers], float]:
    """What it answers, and milliseconds a prompt."""
    start = time.perf_counter()
    way = work()
    seconds = time.perf_counter() - start
    return way, round(1000 * seconds / sum(len(own.predicted) for own in way.values()), 3)
