"""How free text's exits would do on a table's own rows, each asked as if the table lacked it.

Measured by what the table stores, the reference's tokens that are predicted given those before: it
ranks exits and settings, and says less of text that a model goes on with by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from raee_serve.records import EXIT_HEADS
from raee_serve.retrieval.aggregate import (
    DEFAULT_FRACTION,
    DEFAULT_VOTE_WEIGHT,
    QUALITY,
    QUALITY_RULE,
)
from raee_serve.retrieval.heads import nearest_others
from raee_serve.retrieval.leave_one_out import Outcome, row_exits
from raee_serve.retrieval.trust import believed, trust_in
from raee_serve.table.evidence import kept_quality
from raee_serve.table.schema import RuleChoice

QUALITIES = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.88, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
NEIGHBOURS = (12, 24, 48)


def quality_choice(quality: float, k: int = QUALITY_RULE.k) -> RuleChoice:
    """Rule `quality`: to keep so much of full depth's, as k neighbours tell it."""
    return RuleChoice(QUALITY, k, DEFAULT_FRACTION, DEFAULT_VOTE_WEIGHT, quality)


class FreeTextLeaveOneOut:
    """The rows of one free-text task.

    vectors: [n, dimension] float32, L2-normalised, n at least 2; evidence: [n, num_layers], its
    exit information; quality: [n, len(EXIT_HEADS), num_layers], see `table.evidence`.
    """

    def __init__(
        self,
        vectors: NDArray[np.float32],
        evidence: NDArray[np.float32],
        quality: NDArray[np.float32],
    ) -> None:
        self._evidence, self._quality = evidence[:, None], quality
        self.num_rows, _, self.num_layers = quality.shape
        most = min(max(NEIGHBOURS), self.num_rows - 1)
        self._blocks = list(nearest_others(vectors, np.arange(self.num_rows), vectors, most))
        self._nearest, self._similarities = map(np.concatenate, zip(*self._blocks, strict=True))
        self._trust: dict[int, float] = {}

    def layers(self, choice: RuleChoice) -> NDArray[np.int64]:
        """[n] exit layer of each row, 1..num_layers."""
        return self._exits(choice)[0]

    def outcome(self, choice: RuleChoice, points: Sequence[int] = ()) -> Outcome:
        """points: see `aggregate.exits`."""
        layers, heads = self._exits(choice, points)
        own = self._quality[np.arange(self.num_rows), heads, layers - 1]
        depth = float(layers.mean() / self.num_layers)
        full = float(self._quality[:, 0, -1].mean())
        return Outcome(choice, float(own.mean()) / full if full else 0.0, depth)

    def every_outcome(self) -> Iterator[Outcome]:
        """Of rule `quality`, with the settings that this module lists."""
        for k in sorted({min(k, self.num_rows - 1) for k in NEIGHBOURS}):
            yield from self.outcomes(k)

    def outcomes(self, k: int) -> Iterator[Outcome]:
        """Of rule `quality` with k neighbours, the highest threshold first."""
        for quality in QUALITIES:
            yield self.outcome(quality_choice(quality, k))

    def fixed_exits(self) -> Iterator[tuple[float, float, str]]:
        """(depth, quality, name) of each probed exit, were all rows to take it."""
        kept = kept_quality(self._quality)
        for place, head in enumerate(EXIT_HEADS):
            for at in np.flatnonzero(kept[place]):
                what = f"layer {at + 1} for all, {head}"
                yield (at + 1) / self.num_layers, float(kept[place, at]), what

    def _exits(
        self, choice: RuleChoice, points: Sequence[int] = ()
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        evidence = self._as_believed(choice.k) if choice.rule == QUALITY else self._evidence
        return row_exits(self._nearest, self._similarities, evidence, choice, points)

    def _as_believed(self, k: int) -> NDArray[np.float32]:
        """The quality as a look-up of k neighbours has it."""
        if k not in self._trust:
            nearest = ((near[:, :k], similar[:, :k]) for near, similar in self._blocks)
            self._trust[k] = trust_in(self._quality, nearest)
        return believed(self._quality, self._trust[k])
