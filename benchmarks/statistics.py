"""Ratios of paired timings, with an interval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
"""Bootstrap resamples."""


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


def paired_ratio(
    numerators: Sequence[float], denominators: Sequence[float], starts: int = 1
) -> Ratio:
    """Ratio numerator / denominator over pairs measured next to each other.

    starts: see `median_interval`. Raises `ValueError` on unequal lengths.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(f"{len(numerators)} numerators for {len(denominators)} denominators")
    return median_interval(np.asarray(numerators) / np.asarray(denominators), starts)


def median_interval(values: Sequence[float] | NDArray[np.float64], starts: int = 1) -> Ratio:
    """Of figures that each come from one round, and the bootstrap interval, seed 0.

    starts: so many times what is measured was started anew, each time for equally many of the
        values, which stand together. Starts are resampled first, then the values of each.
    Raises `ValueError` if the values cannot be divided so.
    """
    found = np.asarray(values, np.float64)
    if len(found) % starts:
        raise ValueError(f"{len(found)} values of {starts} starts; allowed: a multiple of them")
    of_start = found.reshape(starts, -1)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, starts, (DRAWS, starts, 1))
    values_drawn = rng.integers(0, of_start.shape[1], (DRAWS, *of_start.shape))
    medians = np.median(of_start[drawn, values_drawn].reshape(DRAWS, -1), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return Ratio(float(np.median(found)), float(low), float(high))
