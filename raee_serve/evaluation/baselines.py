"""What needs no exit decision: the answers that every rule has to be compared with.

Whatever is chosen or fitted here is so on the table's rows; the prompts asked are only answered.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raee_serve.evaluation.probed import ProbedTask
from raee_serve.retrieval.heads import (
    BLOCK,
    VOTE_K,
    LeaveOneOutVotes,
    calibrated,
    label_counts,
    log_votes,
)
from raee_serve.retrieval.leave_one_out import LABEL_VOTE_K, best_fixed_layer
from raee_serve.retrieval.stacking import stacked_vote
from raee_serve.table.schema import TaskRows

Array = NDArray[np.float64]

LABEL_VOTE = f"label vote of {LABEL_VOTE_K} neighbours, no model"
WEIGHED_VOTE = "label vote as stacked exits weigh it, no model"


@dataclass(frozen=True, slots=True)
class Answers:
    """One way's answers to a task's prompts.

    predicted: [n] label indices; depth: mean exit layer / num_layers, 0 without a model.
    reasons: how many prompts got their depth for which reason; empty where nothing is decided.
    """

    predicted: NDArray[np.int64]
    depth: float
    reasons: Counter[str] = field(default_factory=Counter)


def baselines(table: TaskRows, asked: ProbedTask) -> dict[str, Answers]:
    """By name, the deepest first. table: the rows of a label-word task, at least 2."""
    assert table.golds is not None and table.label_logprobs is not None
    num_layers, num_labels = asked.label_logprobs.shape[1:]
    no_votes = np.zeros((len(asked.golds), num_labels))
    freed = calibrated(table.label_logprobs).scores(asked.label_logprobs, no_votes).argmax(axis=2)
    layer, _ = best_fixed_layer(table.label_logprobs, table.golds)
    counts = label_counts(table.golds, num_labels)
    similarities, labels = _neighbours(table, asked.vectors, max(LABEL_VOTE_K, VOTE_K["stacked"]))
    votes = log_votes(similarities[:, :LABEL_VOTE_K], labels[:, :LABEL_VOTE_K], counts)
    k = VOTE_K["stacked"]
    wide = log_votes(similarities[:, :k], labels[:, :k], counts)
    own = LeaveOneOutVotes(table.vectors, table.golds, num_labels, k).log_votes(k)
    weight, offset = stacked_vote(table.golds, own)
    return {
        "full depth": Answers(asked.label_logprobs[:, -1].argmax(axis=1), 1.0),
        "full depth, calibrated": Answers(freed[:, -1], 1.0),
        "best fixed layer, calibrated": Answers(freed[:, layer - 1], layer / num_layers),
        LABEL_VOTE: Answers(votes.argmax(axis=1), 0.0),
        WEIGHED_VOTE: Answers((weight * wide + offset).argmax(axis=1), 0.0),
    }


def _neighbours(
    table: TaskRows, queries: NDArray[np.float32], k: int
) -> tuple[Array, NDArray[np.int32]]:
    """[n, k] similarities of the k nearest rows, nearest first, and their labels."""
    assert table.golds is not None
    found = []
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK] @ table.vectors.T
        nearest = np.argsort(-block, axis=1, kind="stable")[:, :k]
        found.append((np.take_along_axis(block, nearest, axis=1), table.golds[nearest]))
    similarities, labels = (np.concatenate(part) for part in zip(*found, strict=True))
    return similarities.astype(np.float64), labels
