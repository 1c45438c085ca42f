"""Offline results: one table a rule, everything it is to be compared with beside it; and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raee_serve.evaluation.baselines import LABEL_VOTE, WEIGHED_VOTE, Answers
from raee_serve.evaluation.metrics import metric_name, score_labels
from raee_serve.evaluation.paired import Comparison, compare
from raee_serve.evaluation.report import aligned

if TYPE_CHECKING:
    from raee_serve.evaluation.offline import TaskAnswers

VOTES = (LABEL_VOTE, WEIGHED_VOTE)


def as_tables(results: Sequence[TaskAnswers]) -> str:
    """For each rule its scores and the baselines' by task, their means, and the mean depths."""
    return "\n\n".join(_rule_table(rule, results) for rule in results[0].rules)


def as_json(results: Sequence[TaskAnswers]) -> str:
    """One line: {"tasks": {NAME: {...}}, "means": {WAY: {...}}, "against_votes": {RULE: {...}}}."""
    names = list(_ways(results[0]))
    rules = list(results[0].rules)
    return json.dumps(
        {
            "tasks": {result.task.name: _task_fields(result) for result in results},
            "means": {
                name: {
                    "score": round(_mean(_score(r, _ways(r)[name]) for r in results), 4),
                    "depth": round(_mean(_ways(r)[name].depth for r in results), 4),
                }
                for name in names
            },
            "against_votes": {
                rule: {vote: _comparison_fields(_against(rule, vote, results)) for vote in VOTES}
                for rule in rules
            },
        }
    )


def _rule_table(rule: str, results: Sequence[TaskAnswers]) -> str:
    rows = [[f"rule {rule}", *(result.task.name for result in results), "mean", "depth"]]
    for name in (rule, *results[0].baselines):
        scores = [_score(result, _ways(result)[name]) for result in results]
        depth = _mean(_ways(result)[name].depth for result in results)
        rows.append([name, *(f"{s:.3f}" for s in (*scores, _mean(scores))), f"{depth:.2f}"])
    own = [result.rules[rule] for result in results]
    depths = [answers.depth for answers in own]
    rows.append(["depth", *(f"{depth:.2f}" for depth in (*depths, _mean(depths))), ""])
    for reason in sorted({reason for answers in own for reason in answers.reasons}):
        shares = [answers.reasons[reason] / answers.reasons.total() for answers in own]
        rows.append([f"share {reason}", *(f"{s:.3f}" for s in (*shares, _mean(shares))), ""])
    against = [f"{rule} against {vote}: {_against(rule, vote, results)}" for vote in VOTES]
    return "\n".join([aligned(rows), *against])


def _ways(result: TaskAnswers) -> dict[str, Answers]:
    return {**result.rules, **result.baselines}


def _score(result: TaskAnswers, answers: Answers) -> float:
    return score_labels(result.task, answers.predicted.tolist(), result.golds.tolist())


def _right(result: TaskAnswers, way: str) -> NDArray[np.bool_]:
    return _ways(result)[way].predicted == result.golds


def _against(rule: str, vote: str, results: Sequence[TaskAnswers]) -> Comparison:
    """In accuracy, also where a task's own metric is another."""
    return compare(
        [_right(result, rule) for result in results], [_right(result, vote) for result in results]
    )


def _task_fields(result: TaskAnswers) -> dict[str, Any]:
    return {
        "n": len(result.golds),
        "metric": metric_name(result.task),
        "ways": {
            name: {
                "score": round(_score(result, answers), 4),
                "depth": round(answers.depth, 4),
                "reasons": dict(answers.reasons),
            }
            for name, answers in _ways(result).items()
        },
    }


def _comparison_fields(found: Comparison) -> dict[str, float]:
    return {
        "difference": round(found.difference, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
        "p": found.p,
    }


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
