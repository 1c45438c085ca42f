"""Ridge regression of labels on features, with out-of-fold scores, in pure NumPy.

Labels are one-hot targets and features are standardised. All fits of one data set, of every fold
and strength, come from one pass over the features: sums of products are kept for each fold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve

from raee_serve.exits.probes import Probe

FOLDS = 5
BLOCK = 4096
"""Rows worked on at once; features may lie in a file."""
TINY = 1e-6
"""Smallest standard deviation of a feature."""


class Features(Protocol):
    """[n, width], of any floating-point type; may be a memory-mapped file."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> NDArray: ...


def fold_of(row_id: str) -> int:
    """0..FOLDS - 1. By the row's id alone, so that rows added later move no other."""
    return int(row_id[:8], 16) % FOLDS


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of one fold's rows: their number, sums, products of features and with targets."""

    rows: int
    features: NDArray[np.float64]
    targets: NDArray[np.float64]
    products: NDArray[np.float64]
    with_targets: NDArray[np.float64]

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.rows + other.rows,
            self.features + other.features,
            self.targets + other.targets,
            self.products + other.products,
            self.with_targets + other.with_targets,
        )


class FoldedRidge:
    """features: [n, width]; golds: [n] label indices; folds: [n] within 0..FOLDS - 1.

    Raises ValueError for features that are not finite.
    """

    def __init__(
        self,
        features: Features,
        golds: NDArray[np.int32],
        num_labels: int,
        folds: NDArray[np.int64],
    ) -> None:
        self._features, self._golds, self._folds = features, golds, folds
        self._num_labels = num_labels
        self._mean, self._std = _mean_and_std(features)
        self._sums = self._summed()

    def probe(self, strength: float, without: int | None = None) -> Probe:
        """Fitted to all rows, or to all but one fold's. strength: added to the diagonal."""
        kept = [self._sums[fold] for fold in range(FOLDS) if fold != without]
        total = sum(kept[1:], kept[0])
        mean, target_mean = total.features / total.rows, total.targets / total.rows
        products = total.products - total.rows * np.outer(mean, mean)
        with_targets = total.with_targets - total.rows * np.outer(mean, target_mean)
        products[np.diag_indices_from(products)] += strength
        weight = solve(products, with_targets, assume_a="pos", overwrite_a=True)
        bias = target_mean - mean @ weight
        scaled = weight.T / self._std
        return Probe(scaled.astype(np.float32), (bias - scaled @ self._mean).astype(np.float32))

    def out_of_fold(self, strength: float) -> NDArray[np.float32]:
        """[n, num_labels] scores of each row by the probe that was fitted without its fold."""
        probes = [self.probe(strength, fold) for fold in range(FOLDS)]
        scores = np.empty((len(self._golds), self._num_labels), np.float32)
        for rows, block in _blocks(self._features):
            folds = self._folds[rows]
            for fold in range(FOLDS):
                of_fold = folds == fold
                scores[rows][of_fold] = probes[fold].scores(block[of_fold])
        return scores

    def _summed(self) -> list[_Sums]:
        width = self._features.shape[1]
        sums = [_nothing(width, self._num_labels) for _ in range(FOLDS)]
        one_hot = np.eye(self._num_labels, dtype=np.float32)
        for rows, block in _blocks(self._features):
            standard = ((block - self._mean) / self._std).astype(np.float32)
            targets = one_hot[self._golds[rows]]
            for fold in range(FOLDS):
                of_fold = self._folds[rows] == fold
                if of_fold.any():
                    sums[fold] = sums[fold] + _sums_of(standard[of_fold], targets[of_fold])
        return sums


def _sums_of(features: NDArray[np.float32], targets: NDArray[np.float32]) -> _Sums:
    return _Sums(
        len(features),
        features.sum(axis=0, dtype=np.float64),
        targets.sum(axis=0, dtype=np.float64),
        (features.T @ features).astype(np.float64),
        (features.T @ targets).astype(np.float64),
    )


def _nothing(width: int, num_labels: int) -> _Sums:
    return _sums_of(np.zeros((0, width), np.float32), np.zeros((0, num_labels), np.float32))


def _mean_and_std(features: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    total, squares = 0.0, 0.0
    for _, block in _blocks(features):
        if not np.isfinite(block).all():
            raise ValueError("features hold values that are not finite")
        total = total + block.sum(axis=0, dtype=np.float64)
        squares = squares + np.square(block, dtype=np.float64).sum(axis=0)
    mean = np.asarray(total / features.shape[0])
    variance = np.maximum(squares / features.shape[0] - mean**2, 0)
    return mean, np.maximum(np.sqrt(variance), TINY)


def _blocks(features: Features):  # type: ignore[no-untyped-def]
    """(which rows, their features as float32), in order."""
    for start in range(0, features.shape[0], BLOCK):
        rows = slice(start, start + BLOCK)
        yield rows, np.asarray(features[rows], np.float32)
