"""How exits would do on the rows of a table, each asked as if the table did not hold it.

What is read of a row is out of fold, and no row is its own neighbour: settings that are chosen here
may be tested on anything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from raee_serve.exits.choice import PUBLISHED_K, Choice
from raee_serve.exits.neighbours import evidence_weights, nearest_others
from raee_serve.exits.rule import NO_EVIDENCE, Exits, expected, published, shallowest
from raee_serve.exits.shrinkage import Neighbours, shrunk, trust_in

NEIGHBOURS = {"probe": (64, 128, 256), "free-text": (12, 24, 48)}
BUDGETS = (1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.87, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
"""What `every_choice` lists, the deepest first."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """accuracy: share of the rows answered correctly; of free text the share of full depth's
    quality that is kept. depth: mean exit layer / num_layers."""

    choice: Choice
    accuracy: float
    depth: float


@dataclass(frozen=True, slots=True)
class Replay:
    """The rows of one task, n at least 2.

    kind: labels answered by probes, labels answered by the plain head and the paper's rule, or
        free text.
    vectors: [n, dimension] float32, L2-normalised.
    evidence: [n, num_heads, num_layers] exit information.
    worth: [n, num_heads, num_layers], what a row gets by leaving there: 1 for the right label and 0
        for a wrong one, or free text's quality.
    certainties: [n], see `TaskFit`; None for tasks without probes.
    """

    kind: Literal["probe", "plain", "free-text"]
    vectors: NDArray[np.float32]
    evidence: NDArray[np.float32]
    worth: NDArray[np.float32]
    certainties: NDArray[np.float32] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.vectors)

    @property
    def num_layers(self) -> int:
        return int(self.evidence.shape[2])

    def every_choice(self) -> list[Choice]:
        """Of the k and budgets that this module lists."""
        different = {min(k, self.num_rows - 1): k for k in reversed(NEIGHBOURS[self.kind])}
        return [Choice(k, budget) for k in different.values() for budget in BUDGETS]

    def outcomes(self, choices: Sequence[Choice], points: Sequence[int] = ()) -> list[Outcome]:
        """One for each choice. points: see `rule.shallowest`."""
        rows, full = np.arange(self.num_rows), 1.0
        if self.kind == "free-text":
            full = float(self.worth[:, 0, -1].mean()) or np.inf
        found = []
        for choice, layers, heads in zip(choices, *self.exits(choices, points), strict=True):
            gained = float(self.worth[rows, heads, layers - 1].mean()) / full
            found.append(Outcome(choice, gained, float(layers.mean()) / self.num_layers))
        return found

    def exits(self, choices: Sequence[Choice], points: Sequence[int] = ()) -> Exits:
        """[len(choices), n] layers, full depth where nothing is known, and heads.

        Works through the rows block by block: beside the result it holds one block's neighbours.
        """
        ks = [PUBLISHED_K if self.kind == "plain" else choice.k for choice in choices]
        told = {k: self._told(k) for k in set(ks)}
        layers = np.empty((len(choices), self.num_rows), np.int64)
        heads = np.zeros_like(layers)
        first = 0
        with threadpool_limits(1, "blas"):  # see `fit.fit_task`
            for near, close in self._neighbours(max(ks)):
                block = slice(first, first + len(near))
                first = block.stop
                for k, evidence in told.items():
                    members = [place for place, own in enumerate(ks) if own == k]
                    budgets = [choices[place].budget for place in members]
                    read = evidence, near[:, :k], close[:, :k]
                    found = self._block(read, block, budgets, points)
                    for place, exits in zip(members, found, strict=True):
                        layers[place, block], heads[place, block] = exits
        return layers, heads

    def _block(
        self,
        read: tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]],
        block: slice,
        budgets: Sequence[float],
        points: Sequence[int],
    ) -> Iterator[Exits]:
        """Exits of a block of rows for each budget. read: evidence of all rows, which of them are
        nearest to those of the block, and their similarities."""
        evidence, near, close = read
        if self.kind == "plain":
            layers = published(evidence[near][:, :, 0], 1 - close)
            layers = _at_points(np.where(layers == NO_EVIDENCE, self.num_layers, layers), points)
            yield from [(layers, np.zeros_like(layers))] * len(budgets)
            return
        alike: tuple[NDArray, ...] = ()
        if self.certainties is not None:
            alike = self.certainties[near], self.certainties[block]
        scores = expected(evidence[near], evidence_weights(close, *alike))
        for budget in budgets:
            layers, heads = shallowest(scores, budget, points)
            yield np.where(layers == NO_EVIDENCE, self.num_layers, layers), heads

    def _told(self, k: int) -> NDArray[np.float32]:
        """The exit information as a look-up of k neighbours has it."""
        if self.kind != "free-text":
            return self.evidence
        return shrunk(self.evidence, trust_in(self.evidence, self._neighbours(k)))

    def _neighbours(self, k: int) -> Neighbours:
        """Of each row its nearest others, k or all that there are."""
        others = min(k, self.num_rows - 1)
        return nearest_others(self.vectors, np.arange(self.num_rows), self.vectors, others)


def shallowest_with(outcomes: Sequence[Outcome], accuracy: float) -> Outcome | None:
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


def _at_points(layers: NDArray[np.int64], points: Sequence[int]) -> NDArray[np.int64]:
    """Each layer moved to the next point; without points as it is."""
    if not points:
        return layers
    allowed = np.sort(points)
    return allowed[np.searchsorted(allowed, layers)]
