"""Quality of answers to a task: accuracy, Matthews correlation (cola), ROUGE-L (free text)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raee_serve.tasks.task import Task

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")

MATTHEWS_TASKS = frozenset({"cola"})
"""Tasks whose labels are too uneven for accuracy; the GLUE benchmark scores them so."""


def metric_name(task: Task) -> str:
    if task.kind == "free-text":
        return "rouge_l"
    return "matthews" if task.name in MATTHEWS_TASKS else "accuracy"


def score(task: Task, answers: Sequence[str], golds: Sequence[int | str]) -> float:
    """Quality of `answers`, in gold order: ROUGE-L and accuracy within 0..1, Matthews -1..1."""
    if task.kind == "free-text":
        return rouge_l(answers, [str(gold) for gold in golds])
    predicted = [predicted_label(task, answer) for answer in answers]
    return score_labels(task, predicted, [int(gold) for gold in golds])


def score_labels(task: Task, predicted: Sequence[int | None], labels: Sequence[int]) -> float:
    """As `score`, of label indices."""
    if metric_name(task) == "matthews":
        return matthews(predicted, labels, len(task.labels))
    return accuracy(predicted, labels)


def predicted_label(task: Task, answer: str) -> int | None:
    """Index of the label that `answer` is, or is the only one to begin with.

    The LM head answers one token, which may be a part of the label.
    """
    said = answer.strip()
    if said in task.labels:
        return task.labels.index(said)
    begun = [i for i, label in enumerate(task.labels) if said and label.startswith(said)]
    return begun[0] if len(begun) == 1 else None


def accuracy(predicted: Sequence[int | None], golds: Sequence[int]) -> float:
    """Share of equal pairs; 0 for none at all."""
    if not golds:
        return 0.0
    return sum(p == g for p, g in zip(predicted, golds, strict=True)) / len(golds)


def matthews(predicted: Sequence[int | None], golds: Sequence[int], num_labels: int) -> float:
    """Correlation of predicted and gold labels over any number of classes; 0 if one is constant.

    Gorodkin (2004), "Comparing two K-category assignments by a K-category correlation
    coefficient". An answer that is no label counts as a class of its own.
    """
    confusion = np.zeros((num_labels + 1, num_labels + 1))
    for p, g in zip(predicted, golds, strict=True):
        confusion[g, num_labels if p is None else p] += 1
    total, correct = confusion.sum(), confusion.trace()
    gold_counts, predicted_counts = confusion.sum(axis=1), confusion.sum(axis=0)
    covariance = correct * total - gold_counts @ predicted_counts
    spread = (total**2 - predicted_counts @ predicted_counts) * (
        total**2 - gold_counts @ gold_counts
    )
    return float(covariance / np.sqrt(spread)) if spread else 0.0


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1, words stemmed; 0 for none at all."""
    scores = rouge(answers, references)["rougeL"]
    return float(scores.mean()) if len(scores) else 0.0


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """[n] F1 of each answer by each of ROUGE_KINDS, words stemmed."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE_KINDS, use_stemmer=True)
    pairs = zip(answers, references, strict=True)
    scores = [scorer.score(reference, answer) for answer, reference in pairs]
    return {kind: np.array([found[kind].fmeasure for found in scores]) for kind in ROUGE_KINDS}
