"""Results of an evaluation: one row per task, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from raee_serve.evaluation.asking import Answer
from raee_serve.evaluation.metrics import metric_name, score
from raee_serve.tasks.task import Task


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task at full depth and at retrieved depths.

    full_accuracy, raee_accuracy: by `metric` (accuracy, matthews, rouge_l).
    mean_exit_layer: over the retrieved run, 1..num_layers. full_rps, raee_rps: requests a second.
    reasons: how many prompts of the retrieved run got their depth for which reason.
    """

    n: int
    metric: str
    full_accuracy: float
    raee_accuracy: float
    mean_exit_layer: float
    num_layers: int
    full_rps: float
    raee_rps: float
    reasons: dict[str, int]

    @classmethod
    def of(
        cls,
        task: Task,
        golds: Sequence[int | str],
        full: tuple[Sequence[Answer], float],
        raee: tuple[Sequence[Answer], float],
    ) -> TaskResult:
        """`full` and `raee` are (answers in gold order, requests per second)."""
        answers, rps = raee
        return cls(
            n=len(golds),
            metric=metric_name(task),
            full_accuracy=score(task, [answer.text for answer in full[0]], golds),
            raee_accuracy=score(task, [answer.text for answer in answers], golds),
            mean_exit_layer=sum(answer.exit_layer for answer in answers) / len(answers),
            num_layers=answers[0].num_layers,
            full_rps=full[1],
            raee_rps=rps,
            reasons=dict(Counter(answer.reason for answer in answers)),
        )


HEADINGS = (
    "task", "n", "metric", "full", "retrieved", "mean exit layer", "of",
    "full req/s", "retrieved req/s", "reasons",
)  # fmt: skip


def as_table(results: Mapping[str, TaskResult]) -> str:
    """Aligned columns, one line per task."""
    return aligned([HEADINGS, *(_cells(name, result) for name, result in results.items())])


def as_json(results: Mapping[str, TaskResult]) -> str:
    """One line: {"tasks": {NAME: {...}}}, numbers rounded to four digits."""
    return json.dumps({"tasks": {name: rounded(result) for name, result in results.items()}})


def rounded(result: TaskResult) -> dict[str, object]:
    """The fields of a result, floats to four digits."""
    fields = asdict(result).items()
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in fields}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns as wide as their widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(name: str, result: TaskResult) -> tuple[str, ...]:
    return (
        name,
        str(result.n),
        result.metric,
        f"{result.full_accuracy:.3f}",
        f"{result.raee_accuracy:.3f}",
        f"{result.mean_exit_layer:.1f}",
        str(result.num_layers),
        f"{result.full_rps:.1f}",
        f"{result.raee_rps:.1f}",
        ", ".join(f"{reason} {count}" for reason, count in sorted(result.reasons.items())),
    )
