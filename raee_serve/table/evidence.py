"""Exit information from what a table stores, in pure NumPy.

Exit information of a row at a layer: the probability of the gold answer if that layer gets it
right, else 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raee_serve.records import EXIT_HEADS
from raee_serve.table.schema import TaskEntry, TaskRows

AGREEMENT = 0.9
"""A layer gets free text right if it picks full depth's token at this share of the reference's
positions: below that, text generated at the layer soon parts from full depth's."""


def evidence_of(rows: TaskRows, entry: TaskEntry, num_layers: int) -> NDArray[np.float32]:
    """[n, num_layers] exit information of a task's rows, of either kind."""
    if entry.kind == "labels":
        assert rows.label_logprobs is not None and rows.golds is not None
        return label_evidence(rows.label_logprobs, rows.golds)
    assert rows.reference_logprob is not None and rows.agreement is not None
    plain = slice(len(entry.layers))
    logprob, agreement = rows.reference_logprob[:, plain], rows.agreement[:, plain]
    return free_text_evidence(logprob, agreement, entry.layers, num_layers)


def free_text_quality(rows: TaskRows, entry: TaskEntry, num_layers: int) -> NDArray[np.float32]:
    """[n, len(EXIT_HEADS), num_layers], within 0..1: how well each exit does on the rows of a
    free-text task; 0 for exits that were not probed.

    The share of the reference's tokens that the exit predicts, given those before. Of rows that do
    not record it their agreement with full depth.
    """
    quality = rows.agreement if rows.reference_hits is None else rows.reference_hits
    assert quality is not None, f"task {entry.name} is not of free text"
    plain = len(entry.layers)
    by_exit = np.zeros((len(quality), len(EXIT_HEADS), num_layers), np.float32)
    by_exit[:, 0, np.array(entry.layers) - 1] = quality[:, :plain]
    by_exit[:, 1, np.array(entry.shortcut_layers, int) - 1] = quality[:, plain:]
    return by_exit


def kept_quality(quality: NDArray[np.float32]) -> NDArray[np.float64]:
    """[n, heads, num_layers] quality of rows -> [heads, num_layers] of full depth's that each exit
    keeps on all of them; 0 where full depth has none."""
    sums = quality.sum(axis=0, dtype=np.float64)
    full = sums[0, -1]
    return sums / full if full > 0 else np.zeros_like(sums)


def most_kept(quality: NDArray[np.float32]) -> float:
    """[n, heads, num_layers] quality of rows -> the largest share of full depth's that any exit
    before the last layer keeps on any of them; infinite where full depth has none and an exit has.

    No neighbours, however weighed, say more of an exit.
    """
    best = quality[:, :, :-1].max(axis=(1, 2), initial=0).astype(np.float64)
    unmatched = np.where(best > 0, np.inf, 0.0)
    full = quality[:, 0, -1]
    return float(np.divide(best, full, out=unmatched, where=full > 0).max())


def label_evidence(scores: NDArray[np.floating], golds: NDArray[np.int32]) -> NDArray[np.float32]:
    """[n, num_layers, num_labels] scores of the label words, [n] label indices -> [n, num_layers].

    The gold label's probability (softmax of the scores, of which log-probabilities are some) where
    its score is the highest, else 0. Of equal scores the first counts as the prediction, as in a
    greedy sampler.
    """
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    gold = np.take_along_axis(shifted, golds[:, None, None], axis=-1)[..., 0]
    right = scores.argmax(axis=-1) == golds[:, None]
    return np.where(right, gold / shifted.sum(axis=-1), 0).astype(np.float32)


def free_text_evidence(
    reference_logprob: NDArray[np.float32],
    agreement: NDArray[np.float32],
    layers: Sequence[int],
    num_layers: int,
) -> NDArray[np.float32]:
    """[n, len(layers)] twice -> [n, num_layers]; layers that were not probed hold 0.

    exp(mean log-probability of the reference's tokens) where agreement >= AGREEMENT, else 0; full
    depth (the last of `layers`) agrees with itself and so always counts.
    """
    assert layers[-1] == num_layers, f"full depth {num_layers} missing from layers {layers}"
    right = agreement >= AGREEMENT
    right[:, -1] = True
    evidence = np.zeros((len(reference_logprob), num_layers), np.float32)
    evidence[:, np.array(layers) - 1] = np.where(right, np.exp(reference_logprob), 0)
    return evidence
