"""Layers left out by their block influence (ShortGPT), and what a backbone answers then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raee_serve.evaluation.baselines import Answers
from raee_serve.evaluation.suite.backbone import StudiedBackbone
from raee_serve.evaluation.suite.material import Material
from raee_serve.retrieval.heads import calibrated
from raee_serve.table.task import Task, prompt_token_ids

ROWS, PROMPTS = 200, 200
"""A task's table rows and prompts that are run with layers left out."""
BATCH = 16

Array = NDArray[np.float64]


class LayerDropping:
    """Of a material's backbone. Influence is measured on table rows."""

    def __init__(self, material: Material) -> None:
        """Raises TaskError as `Material.texts`."""
        self._material = material
        self._backbone = StudiedBackbone(material.checkpoint)
        self._rows: dict[str, list[list[int]]] = {}
        self._prompts: dict[str, list[list[int]]] = {}
        for task in material.tasks:
            texts = material.texts(task, material.some_rows(task, ROWS))
            self._rows[task.name] = self._token_ids(task, texts)
            self._prompts[task.name] = self._token_ids(task, material.asked(task).texts[:PROMPTS])
        influence = [
            self._backbone.block_influence(batch)
            for rows in self._rows.values()
            for batch in _batches(rows)
        ]
        self._least_first: NDArray[np.int64] = 1 + np.argsort(np.mean(influence, axis=0))

    def dropped(self, n: int) -> list[int]:
        """The n layers (from 1) of least influence, ascending."""
        return sorted(self._least_first[:n].tolist())

    def kept(self, n: int) -> list[int]:
        """The n others, ascending."""
        return sorted(self._least_first[len(self._least_first) - n :].tolist())

    def answers(self, n: int) -> dict[str, Answers]:
        """By task what is answered with n layers left out, calibrated on the table's rows."""
        share = 1 - n / self._backbone.num_layers
        ways: dict[str, Answers] = {}
        biases = self.biases(n)
        with self._backbone.without(self.dropped(n)):
            for task in self._material.tasks:
                scores = self._scores(task, self._prompts[task.name]) - biases[task.name]
                ways[task.name] = Answers(scores.argmax(axis=1), share)
        return ways

    def biases(self, n: int) -> dict[str, Array]:
        """By task, [num_labels]: how the table's rows lean to each label with n layers left out."""
        with self._backbone.without(self.dropped(n)):
            return {
                task.name: calibrated(self._scores(task, self._rows[task.name])[:, None]).bias[0]
                for task in self._material.tasks
            }

    def _token_ids(self, task: Task, texts: Sequence[str]) -> list[list[int]]:
        return [prompt_token_ids(self._backbone.tokenizer, task.render(text)) for text in texts]

    def _scores(self, task: Task, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """[n, num_labels] of the last layer that is left."""
        ids = self._material.table.metadata.tasks[task.name].label_token_ids
        parts = [self._backbone.label_logprobs(batch, ids)[:, -1] for batch in _batches(prompts)]
        return np.concatenate(parts)


def _batches(prompts: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
    return [prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)]
