"""Exit information from what a table stores of rows without a fit, in pure NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raee_serve.records import EXIT_HEADS
from raee_serve.table.schema import TaskEntry, TaskRows


def free_text_quality(rows: TaskRows, entry: TaskEntry, num_layers: int) -> NDArray[np.float32]:
    """[n, len(EXIT_HEADS), num_layers], within 0..1: how well each exit does on the rows of a
    free-text task; 0 for exits that were not probed.

    The share of the reference's tokens that the exit predicts, given those before.
    """
    hits = rows.reference_hits
    assert hits is not None, f"task {entry.name} is not of free text"
    plain = len(entry.layers)
    by_exit = np.zeros((len(hits), len(EXIT_HEADS), num_layers), np.float32)
    by_exit[:, 0, np.array(entry.layers) - 1] = hits[:, :plain]
    by_exit[:, 1, np.array(entry.shortcut_layers, int) - 1] = hits[:, plain:]
    return by_exit


def most_kept(quality: NDArray[np.float32]) -> float:
    """[n, heads, num_layers] quality of rows -> the largest share of full depth's that any exit
    before the last layer keeps on any of them; infinite where full depth has none and an exit has.

    No neighbours, however weighed, say more of an exit.
    """
    best = quality[:, :, :-1].max(axis=(1, 2), initial=0).astype(np.float64)
    unmatched = np.where(best > 0, np.inf, 0.0)
    full = quality[:, 0, -1]
    return float(np.divide(best, full, out=unmatched, where=full > 0).max())


def plain_evidence(logprobs: NDArray[np.floating], golds: NDArray[np.int32]) -> NDArray[np.float32]:
    """[n, num_layers, num_labels] log-probabilities, [n] label indices -> [n, num_layers].

    The gold label's probability where it is the highest, else 0. Of equal ones the first counts as
    the prediction, as in a greedy sampler.
    """
    gold = np.take_along_axis(np.exp(logprobs), golds[:, None, None], axis=-1)[..., 0]
    return np.where(logprobs.argmax(axis=-1) == golds[:, None], gold, 0).astype(np.float32)
