"""Is one way to answer better than another on the same prompts? Pure NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 100_000
"""Resamples, and random outcomes under the null hypothesis."""
SCORE_DRAWS = 10_000
"""Of scores, which are drawn one by one."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """difference: mean over tasks of the difference in accuracy (or in another score); low, high:
    its bootstrap 95% interval; p: of a two-sided test (for accuracy on one task McNemar's)."""

    difference: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p = {self.p:.2g}"


def compare(ours: Sequence[NDArray[np.bool_]], theirs: Sequence[NDArray[np.bool_]]) -> Comparison:
    """ours, theirs: for each task, whether each of its prompts is answered correctly.

    Prompts are resampled within their tasks, and every task counts alike. Under the null hypothesis
    either way is as likely to be the right one where only one of them is: p is the share of DRAWS
    such outcomes, seed 0, that differ by as much.
    """
    rng = np.random.default_rng(0)
    observed = 0.0
    resampled, by_chance = np.zeros(DRAWS), np.zeros(DRAWS)
    for own, other in zip(ours, theirs, strict=True):
        n, wins, losses = len(own), int((own & ~other).sum()), int((other & ~own).sum())
        observed += (wins - losses) / n
        drawn = rng.multinomial(n, [wins / n, losses / n, 1 - (wins + losses) / n], DRAWS)
        resampled += (drawn[:, 0] - drawn[:, 1]) / n
        by_chance += (2 * rng.binomial(wins + losses, 0.5, DRAWS) - (wins + losses)) / n
    low, high = np.quantile(resampled, [0.025, 0.975]) / len(ours)
    as_far = (np.abs(by_chance) >= abs(observed) - 1e-12).sum()
    return Comparison(
        observed / len(ours), float(low), float(high), float((1 + as_far) / (1 + DRAWS))
    )


def compare_scores(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Comparison:
    """ours, theirs: [n] scores of the same prompts.

    As `compare`, of SCORE_DRAWS; under the null hypothesis either way has the better score as
    likely as not, so that each difference may have either sign.
    """
    rng = np.random.default_rng(0)
    differences = ours - theirs
    n, observed = len(differences), float(differences.mean())
    resampled = differences[rng.integers(0, n, (SCORE_DRAWS, n))].mean(axis=1)
    by_chance = (differences * rng.choice([-1.0, 1.0], (SCORE_DRAWS, n))).mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    as_far = (np.abs(by_chance) >= abs(observed) - 1e-12).sum()
    return Comparison(observed, float(low), float(high), float((1 + as_far) / (1 + SCORE_DRAWS)))
