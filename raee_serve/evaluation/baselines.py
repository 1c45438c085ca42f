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
    VOTE_K,
    LeaveOneOutVotes,
    calibrated,
    label_counts,
    log_votes,
    nearest_others,
)
from raee_serve.retrieval.leave_one_out import (
    LABEL_VOTE,
    LABEL_VOTE_K,
    WEIGHED_VOTE,
    best_fixed_layer,
)
from raee_serve.retrieval.stacking import stacked_vote
from raee_serve.table.schema import TaskRows

Array = NDArray[np.float64]


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
    freed = (asked.label_logprobs - calibrated(table.label_logprobs).bias).argmax(axis=2)
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
    in_table = np.full(len(queries), -1)  # none of them is a row
    found = list(nearest_others(queries, in_table, table.vectors, min(k, len(table))))
    nearest, similarities = (np.concatenate(part) for part in zip(*found, strict=True))
    return similarities.astype(np.float64), table.golds[nearest]
