"""Ratios of paired timings, with an interval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ratio:
    """Median of paired figures, mostly ratios, and its bootstrap 95% interval."""

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratio numerator / denominator over pairs measured next to each other.

    Raises `ValueError` on unequal lengths.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(f"{len(numerators)} numerators for {len(denominators)} denominators")
    return median_interval(np.asarray(numerators) / np.asarray(denominators))


def median_interval(values: Sequence[float] | NDArray[np.float64]) -> Ratio:
    """Of figures that each come from one round; 10,000 bootstrap resamples, seed 0."""
    found = np.asarray(values, np.float64)
    picks = np.random.default_rng(0).integers(0, len(found), (10_000, len(found)))
    low, high = np.quantile(np.median(found[picks], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(found)), float(low), float(high))
