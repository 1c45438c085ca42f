"""A task's test rows, as backbone and encoder see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from raee_serve.exits.fit import ALONE, TaskFit
from raee_serve.retrieval.retriever import KnowsItself
from raee_serve.table.build import DEFAULT_BATCH_TOKENS
from raee_serve.table.evidence import free_text_quality
from raee_serve.table.probe import LayerProbe
from raee_serve.table.rows import Batch, ItemMaker, Scores, length_batches
from raee_serve.table.schema import EncoderIdentity, TaskEntry, TaskRows
from raee_serve.tasks.datasets import Example
from raee_serve.tasks.task import Task

AT_ONCE = 64
"""Texts embedded together."""


@dataclass(frozen=True, slots=True)
class LabelRows:
    """Test rows of a label task.

    golds: [n]. scores: by name of a probe what the state alone says, [n, num_labels]; empty for a
        task without probes. alone: the probe that answers without a look-up, None likewise.
    plain: [n, num_layers, num_labels] log-probabilities by the plain head; None where labels share
        their first token.
    """

    golds: NDArray[np.int32]
    scores: dict[str, NDArray[np.float32]]
    alone: str | None
    plain: NDArray[np.float32] | None


def label_rows(
    backbone: LayerProbe,
    task: Task,
    entry: TaskEntry,
    fit: TaskFit | None,
    examples: Sequence[Example],
) -> LabelRows:
    """entry, fit: the table's. Of a row's states nothing is kept but the probes' scores."""
    probes = {} if fit is None else fit.named_probes(entry.name)
    at = [] if fit is None else [*range(len(fit.layers)), len(fit.layers) - 1]

    def scores(batch: Batch) -> Scores:
        layers = () if fit is None else fit.layers
        prompts = [item.prompt for item in batch]
        states, plain = backbone.label_states(prompts, layers, entry.plain_token_ids)
        own = [
            probe.scores(states[:, place].astype(np.float32))
            for probe, place in zip(probes.values(), at, strict=True)
        ]
        return *own, plain

    *own, plain = _in_batches(backbone, task, examples, scores)
    return LabelRows(
        np.array([example.gold for example in examples], np.int32),
        dict(zip(probes, own, strict=True)),
        f"{entry.name}/{ALONE}" if probes else None,
        plain if entry.plain_token_ids else None,
    )


def quality_of(
    backbone: LayerProbe, task: Task, entry: TaskEntry, examples: Sequence[Example]
) -> NDArray[np.float32]:
    """[n, len(EXIT_HEADS), num_layers] of free text, as `table.evidence` has it of table rows."""

    def hits(batch: Batch) -> Scores:
        prompts, references = zip(*((i.prompt, i.reference) for i in batch), strict=True)
        return (backbone.reference_scores(prompts, references, entry.layers)[1],)

    [found] = _in_batches(backbone, task, examples, hits)
    rows = TaskRows([""] * len(found), np.empty((len(found), 0), np.float32), reference_hits=found)
    return free_text_quality(rows, entry, backbone.num_layers)


def _in_batches(
    backbone: LayerProbe,
    task: Task,
    examples: Sequence[Example],
    score: Callable[[Batch], Scores],
) -> list[NDArray]:
    """Each of the arrays that `score` gives, of all rows in the order of `examples`."""
    maker = ItemMaker(task, backbone)
    items = [maker.item(example) for example in examples]
    order = sorted(range(len(items)), key=lambda i: items[i].length, reverse=True)
    parts = []
    with tqdm(total=len(items), desc=f"{task.name} test rows", unit="row") as bar:
        for batch in length_batches([items[i] for i in order], DEFAULT_BATCH_TOKENS):
            parts.append(score(batch))
            bar.update(len(batch))
    back = np.argsort(order)
    return [np.concatenate(part)[back] for part in zip(*parts, strict=True)]


class Remembering:
    """An encoder that embeds each text once, some at a time."""

    def __init__(self, encoder: KnowsItself) -> None:
        self._encoder = encoder
        self.dimension = encoder.dimension
        self._known: dict[str, NDArray[np.float32]] = {}

    def identity(self) -> EncoderIdentity:
        return self._encoder.identity()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[len(texts), dimension]"""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in tqdm(range(0, len(new), AT_ONCE), desc="embedding", disable=len(new) < 1000):
            part = new[start : start + AT_ONCE]
            self._known |= zip(part, self._encoder.encode(part), strict=True)
        return np.stack([self._known[text] for text in texts])
