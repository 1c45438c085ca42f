"""How a rule would do on a table's own rows, each asked as if the table did not hold it.

Nothing but table rows is used, so settings chosen by it may be tested on anything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raee_serve.retrieval.aggregate import NO_EVIDENCE, RULES, exits, rule_named, share_of
from raee_serve.retrieval.heads import (
    BLOCK,
    VOTE_K,
    Head,
    HeadName,
    LeaveOneOutVotes,
    calibrated,
    fused,
    plain,
)
from raee_serve.retrieval.stacking import stacked, stacked_vote
from raee_serve.table.evidence import label_evidence
from raee_serve.table.schema import RuleChoice

Array = NDArray[np.float64]

MAX_NEIGHBOURS = 128
FRACTIONS = (1.0, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7)
NEIGHBOURS = {
    "published": (8, 12, 24),
    "earliest": (8, 12, 24),
    "calibrated": (12, 24, 48),
    "fused": (16, 32, 48),
    "stacked": (64, 128),
}
LABEL_VOTE_K = 32
"""Neighbours of the bare label vote that stands beside the rules."""
LABEL_VOTE = f"label vote of {LABEL_VOTE_K} neighbours, no model"
WEIGHED_VOTE = "label vote as stacked exits weigh it, no model"
VOTE_WEIGHTS = (0.5, 1.0, 2.0, 3.0)
"""Of fused exits; stacked ones have fitted weights."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """accuracy: share of the rows answered correctly, or of free text the mean share of full
    depth's quality that is kept; depth: mean exit layer / num_layers."""

    choice: RuleChoice
    accuracy: float
    depth: float


class LeaveOneOut:
    """The rows of one label-word task.

    vectors: [n, dimension] float32, L2-normalised, n at least 2; golds: [n] label indices;
    label_logprobs: [n, num_layers, num_labels].
    """

    def __init__(
        self,
        vectors: NDArray[np.float32],
        golds: NDArray[np.int32],
        label_logprobs: NDArray[np.float32],
    ) -> None:
        self._golds, self._logprobs = golds, label_logprobs
        self.num_rows, self.num_layers, self._num_labels = label_logprobs.shape
        self._votes = LeaveOneOutVotes(vectors, golds, self._num_labels, MAX_NEIGHBOURS)
        self._stacked = stacked(label_logprobs, golds, self._votes.log_votes(VOTE_K["stacked"]))

    def outcomes(
        self,
        rule: str,
        k: int,
        vote_weight: float,
        fractions: Sequence[float],
        points: Sequence[int] = (),
    ) -> Iterator[Outcome]:
        """One outcome for each fraction; points: see `aggregate.exits`."""
        heads = [self._head(name, vote_weight) for name in RULES[rule].heads]
        evidence = self._evidence(rule, k, vote_weight)
        right = np.stack([self._right(head, k) for head in heads], axis=1)
        for fraction in fractions:
            choice = RuleChoice(rule, k, fraction, vote_weight)
            layers, chosen = self._exits(evidence, choice, points)
            correct = right[np.arange(self.num_rows), chosen, layers - 1]
            yield Outcome(choice, float(correct.mean()), float(layers.mean() / self.num_layers))

    def outcome(self, choice: RuleChoice, points: Sequence[int] = ()) -> Outcome:
        """points: see `aggregate.exits`."""
        about = choice.rule, choice.k, choice.vote_weight, [choice.fraction]
        [outcome] = self.outcomes(*about, points)
        return outcome

    def layers(self, choice: RuleChoice) -> NDArray[np.int64]:
        """[n] exit layer of each row, 1..num_layers."""
        return self._exits(self._evidence(choice.rule, choice.k, choice.vote_weight), choice)[0]

    def every_outcome(self) -> Iterator[Outcome]:
        """Of all rules, with the settings that this module lists."""
        for rule, neighbours in NEIGHBOURS.items():
            weights = VOTE_WEIGHTS if "fused" in RULES[rule].heads else VOTE_WEIGHTS[1:2]
            fractions = FRACTIONS if rule != "published" else FRACTIONS[:1]
            for k in sorted({min(k, self.num_rows - 1) for k in neighbours}):
                for weight in weights:
                    yield from self.outcomes(rule, k, weight, fractions)

    def full_depth(self) -> float:
        """Accuracy of the last layer as it is."""
        return float((self._logprobs[:, -1].argmax(axis=1) == self._golds).mean())

    def best_layer(self) -> tuple[int, float]:
        """The best fixed layer (1..num_layers), calibrated, and its accuracy."""
        return best_fixed_layer(self._logprobs, self._golds)

    def label_vote(self, k: int) -> float:
        """Accuracy of the neighbours' vote alone, without any model."""
        return float((self._votes.log_votes(k).argmax(axis=1) == self._golds).mean())

    def stacked_vote(self) -> float:
        """Accuracy of the vote as the stacked head hears it, without any model."""
        votes = self._votes.log_votes(VOTE_K["stacked"])
        weight, offset = stacked_vote(self._golds, votes)
        return float(((weight * votes + offset).argmax(axis=1) == self._golds).mean())

    def _evidence(self, rule: str, k: int, vote_weight: float) -> NDArray[np.float32]:
        """[n, num_heads, num_layers] exit information of the rows under the rule's heads."""
        scores = (
            self._scores(self._head(name, vote_weight), VOTE_K.get(name, k))
            for name in RULES[rule].heads
        )
        return np.stack([label_evidence(own, self._golds) for own in scores], axis=1)

    def _exits(
        self, evidence: NDArray[np.float32], choice: RuleChoice, points: Sequence[int] = ()
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        votes = self._votes
        return row_exits(votes.nearest, votes.similarities, evidence, choice, points)

    def _head(self, name: HeadName, vote_weight: float) -> Head:
        if name == "plain":
            return plain(self.num_layers, self._num_labels)
        if name == "calibrated":
            return calibrated(self._logprobs)
        return self._stacked if name == "stacked" else fused(self._logprobs, vote_weight)

    def _right(self, head: Head, k: int) -> NDArray[np.bool_]:
        """[n, num_layers]: whether the row, asked with k neighbours, is answered correctly."""
        return self._scores(head, k).argmax(axis=2) == self._golds[:, None]

    def _scores(self, head: Head, k: int) -> Array:
        """[n, num_layers, num_labels], with the vote of k neighbours."""
        return head.scores(self._logprobs, self._votes.log_votes(k))


def best_fixed_layer(
    label_logprobs: NDArray[np.float32], golds: NDArray[np.int32]
) -> tuple[int, float]:
    """The layer (1..num_layers) that answers most rows correctly when calibrated, and its share."""
    scores = label_logprobs - calibrated(label_logprobs).bias
    right = (scores.argmax(axis=2) == golds[:, None]).mean(axis=0)
    return int(right.argmax()) + 1, float(right.max())


def row_exits(
    nearest: NDArray[np.int32],
    similarities: NDArray[np.float32],
    evidence: NDArray[np.float32],
    choice: RuleChoice,
    points: Sequence[int] = (),
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[n] layers (full depth without evidence), [n] heads; block by block to bound memory.

    points: see `aggregate.exits`.
    """
    rule, layers, heads = rule_named(choice.rule), [], []
    share = share_of(rule, choice.fraction, choice.quality)
    for start in range(0, len(nearest), BLOCK):
        near = nearest[start : start + BLOCK, : choice.k]
        distances = 1 - similarities[start : start + BLOCK, : choice.k]
        layer, head = exits(rule, evidence[near], distances, fraction=share, points=points)
        layers.append(np.where(layer == NO_EVIDENCE, evidence.shape[2], layer))
        heads.append(head)
    return np.concatenate(layers), np.concatenate(heads)


def shallowest(outcomes: Sequence[Outcome], accuracy: float) -> Outcome | None:
    """The one of the least depth that is at least so accurate, of equals the most accurate."""
    able = [o for o in outcomes if o.accuracy >= accuracy]
    return min(able, key=lambda o: (o.depth, -o.accuracy), default=None)


def frontier(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes that no other beats in both accuracy and depth, shallowest first."""
    best: list[Outcome] = []
    for outcome in sorted(outcomes, key=lambda o: (o.depth, -o.accuracy)):
        if not best or outcome.accuracy > best[-1].accuracy:
            best.append(outcome)
    return best
