"""Offline results: a table, what it says in a sentence a task, and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raee_serve.evaluation.metrics import metric_name
from raee_serve.evaluation.paired import Comparison, compare
from raee_serve.evaluation.report import aligned

if TYPE_CHECKING:
    from raee_serve.evaluation.offline import Answers, Evaluated

BASELINES = ("full", "full_calibrated", "best_fixed_layer", "label_vote", "logistic_regression")
LINEAR = "logistic_regression"
NOTHING = 0.005
"""A gain in accuracy that is at most so large is none."""


def as_table(results: Sequence[Evaluated]) -> str:
    """Scores by task, their means, the mean depths; then the verdicts."""
    rows = [["", *(result.task.name for result in results), "mean", "depth"]]
    for budget in results[0].budgets:
        rows += _lines(f"budget {budget:g}", results, lambda own, b=budget: own.budgets[b])
    rows += _lines("published", results, lambda own: own.published)
    for name in BASELINES:
        rows += _lines(name, results, lambda own, name=name: own.baselines[name])
    return "\n".join([aligned(rows), "", *_verdicts(results)])


def as_json(results: Sequence[Evaluated]) -> str:
    """One line: means over the tasks, and under "tasks" the same of each task."""
    tasks = {result.task.name: _fields([result]) | _task_fields(result) for result in results}
    return json.dumps({**_fields(_averaged(results)), "tasks": tasks})


def _averaged(results: Sequence[Evaluated]) -> Sequence[Evaluated]:
    """Label tasks, or free text where there is nothing else: what these score is not the same."""
    return [result for result in results if result.task.kind == "labels"] or results


def _fields(results: Sequence[Evaluated]) -> dict[str, Any]:
    """Means over tasks; None where one of them has no such answers."""
    best_fixed = [result.baselines["best_fixed_layer"] for result in results]
    return {
        "budgets": [
            {
                "budget": budget,
                **_way([result.budgets[budget] for result in results]),
                "over_logistic_regression": _gain(results, budget),
            }
            for budget in results[0].budgets
        ],
        "baselines": {
            name: _way([result.baselines[name] for result in results])["accuracy"]
            for name in BASELINES
        },
        "best_fixed_layer_depth": _way(best_fixed)["depth"],
        "published": _way([result.published for result in results]),
        "verdict": _verdict(results),
    }


def _task_fields(result: Evaluated) -> dict[str, Any]:
    is_free_text = result.task.kind == "free-text"
    return {
        "rows": len(next(iter(result.budgets.values())).gained),
        "metric": "quality kept" if is_free_text else metric_name(result.task),
        "reasons": [dict(answers.reasons) for answers in result.budgets.values()],
    }


def _way(ways: Sequence[Answers | None]) -> dict[str, float | None]:
    known = [way for way in ways if way is not None]
    if len(known) < len(ways):
        return {"accuracy": None, "depth": None}
    return {
        "accuracy": round(float(np.mean([way.score for way in known])), 4),
        "depth": round(float(np.mean([way.depth for way in known])), 4),
    }


def _compared(results: Sequence[Evaluated], budget: float) -> Comparison | None:
    """Ours against the logistic regression, in accuracy, row by row."""
    ours = [result.budgets[budget].gained for result in results]
    theirs = [way.gained for result in results if (way := result.baselines[LINEAR])]
    return compare(ours, theirs) if len(theirs) == len(ours) else None


def _gain(results: Sequence[Evaluated], budget: float) -> dict[str, float] | None:
    found = _compared(results, budget)
    if found is None:
        return None
    return {name: round(getattr(found, name), 4) for name in ("difference", "low", "high")}


def _verdicts(results: Sequence[Evaluated]) -> list[str]:
    lines = [f"{result.task.name}: {_verdict([result])}" for result in results]
    if len(averaged := _averaged(results)) > 1:
        lines.append(f"mean of {len(averaged)}: {_verdict(averaged)}")
    return lines


def _verdict(results: Sequence[Evaluated]) -> str:
    """What the highest budget says."""
    budget = max(results[0].budgets)
    way = _way([result.budgets[budget] for result in results])
    about = f"{way['accuracy']:.3f} at {way['depth']:.2f} of the layers (budget {budget:g})"
    found = _compared(results, budget)
    if found is None:
        return f"{about}."
    if found.high <= NOTHING:
        return (
            "The language model adds nothing here: a linear classifier on embeddings does as well "
            f"({about}, difference {_interval(found)})."
        )
    if found.low > 0:
        return f"{about}, {_interval(found)} over a linear classifier on embeddings."
    return (
        f"{about}; the difference from a linear classifier on embeddings, {_interval(found)}, may "
        "be chance."
    )


def _interval(found: Comparison) -> str:
    return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _lines(
    name: str, results: Sequence[Evaluated], of: Callable[[Evaluated], Answers | None]
) -> list[list[str]]:
    """The scores of one way by task, and its depths where they are chosen."""
    ways, mean = [of(result) for result in results], _way([*map(of, _averaged(results))])
    scores, depths = ([way and getattr(way, what) for way in ways] for what in ("score", "depth"))
    if not any(ways):
        return []
    lines = [[name, *map(_cell, [*scores, mean["accuracy"]]), _cell(mean["depth"])]]
    if {0.0, 1.0, None}.issuperset(depths):
        return lines
    return [*lines, ["  depth", *map(_cell, depths), "", ""]]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
