"""The documents of free-text tasks, and how well they are summarised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raee_serve.evaluation.asking import SUMMARY_TOKENS
from raee_serve.evaluation.documents import answer_settings, documents_to_test
from raee_serve.evaluation.metrics import rouge
from raee_serve.evaluation.suite.findings import Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.serving import Timed
from raee_serve.table.task import Task

DRAWS = 10_000
"""Resamples for an interval."""


@dataclass(frozen=True, slots=True)
class Documents:
    """By task: what is to be summarised, and the reference summaries."""

    texts: Mapping[Task, Sequence[str]]
    references: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, material: Material) -> Documents:
        """Of all free-text tasks of the material, none if none are asked for.

        Raises TaskError where the data are not there.
        """
        source = material.source
        texts: dict[Task, Sequence[str]] = {}
        references: dict[str, Sequence[str]] = {}
        for task in material.summaries if source.documents else ():
            rows = documents_to_test(task, source.data, source.documents, source.seed)
            texts[task] = [row.text for row in rows]
            references[task.name] = [str(row.gold) for row in rows]
        return cls(texts, references)

    def rouge_l(self, way: Mapping[str, Timed]) -> dict[str, NDArray[np.float64]]:
        """By task, [n]: F1 of each summary."""
        return {
            name: rouge([answer.text for answer in way[name].answers], own)["rougeL"]
            for name, own in self.references.items()
        }

    def scored(self, way: Mapping[str, Timed], depths: Sequence[float]) -> Row:
        """ROUGE-L: mean over the tasks, with the bootstrap 95% interval over their documents.

        depths: mean exit layer / num_layers of each task.
        """
        rng = np.random.default_rng(0)
        scores = self.rouge_l(way)
        means = {name: float(own.mean()) for name, own in scores.items()}
        resampled = [
            own[rng.integers(0, len(own), (DRAWS, len(own)))].mean(axis=1)
            for own in scores.values()
        ]
        low, high = np.quantile(np.mean(resampled, axis=0), [0.025, 0.975])
        return {
            **{name: round(mean, 4) for name, mean in means.items()},
            "ROUGE-L": round(float(np.mean(list(means.values()))), 4),
            "low": round(float(low), 4),
            "high": round(float(high), 4),
            "depth": round(float(np.mean(depths)), 4),
        }


def settings(task: Task) -> Mapping[str, Any]:
    """Of every request for a summary; label words need none."""
    return answer_settings(task, SUMMARY_TOKENS) if task.kind == "free-text" else {}
