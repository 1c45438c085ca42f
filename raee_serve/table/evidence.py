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


def kept_quality(rows: TaskRows, entry: TaskEntry, num_layers: int) -> NDArray[np.float32]:
    """[n, len(EXIT_HEADS), num_layers], within 0..1: the share of full depth's quality that each
    exit keeps on the rows of a free-text task; 0 for exits that were not probed, 1 at full depth.

    Of one reference token full depth's probability is kept to exp(difference of the mean
    log-probabilities); an exit that does better than full depth keeps all.
    """
    logprob = rows.reference_logprob
    assert logprob is not None, f"task {entry.name} is not of free text"
    full = len(entry.layers) - 1
    share = np.exp(np.minimum(logprob - logprob[:, full, None], 0))
    kept = np.zeros((len(logprob), len(EXIT_HEADS), num_layers), np.float32)
    kept[:, 0, np.array(entry.layers) - 1] = share[:, : full + 1]
    kept[:, 1, np.array(entry.shortcut_layers, int) - 1] = share[:, full + 1 :]
    return kept


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
