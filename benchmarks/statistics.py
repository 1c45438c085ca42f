"""Ratios of paired timings, with an interval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios and its bootstrap 95% interval."""

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratio numerator / denominator over pairs measured next to each other.

    10,000 bootstrap resamples of the pairs, seed 0. Raises `ValueError` on unequal lengths.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(f"{len(numerators)} numerators for {len(denominators)} denominators")
    ratios = np.asarray(numerators) / np.asarray(denominators)
    picks = np.random.default_rng(0).integers(0, len(ratios), (10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))
