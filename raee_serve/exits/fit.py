"""A task's fit: its probes, how loudly each voice is heard, and the exit information of its rows.

The score of a label at an exit layer is the weighted sum of three voices:

    state_weight * (state @ weight.T + bias)     the probe, which an engine's worker applies
    encoder_weight * (vector @ weight.T + bias)  in the front end, from the prompt's own vector
    vote_weight * log vote                       likewise, from the labels of its neighbours

Everything recorded of a row is out of fold: by probes, encoder map and weights fitted without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from threadpoolctl import threadpool_limits

from raee_serve.errors import TableError
from raee_serve.exits.logistic import logistic
from raee_serve.exits.neighbours import Array, neighbour_votes
from raee_serve.exits.probes import Probe, packed
from raee_serve.exits.ridge import FOLDS, Features, FoldedRidge, fold_of
from raee_serve.exits.voices import fitted_weights, log_likelihood, mixed, softmax

STATE_STRENGTHS = (100.0, 300.0, 1000.0, 3000.0)
"""Of the ridge, on standardised features; the one with the best out-of-fold likelihood is taken."""
FEWEST_ROWS = 40
"""Below this there is nothing to hold out from."""
ALL_VOTE = 50_000
SAMPLED_VOTERS = 16_384
"""In a task of more than ALL_VOTE rows so many of them, drawn once, vote on each row: to compare
each of a million rows with each other takes hours."""

ALONE = "alone"
"""Name of the probe of the last layer that hears the state alone: for prompts without a look-up."""


@dataclass(frozen=True)
class TaskFit:
    """What was fitted to the rows of one label task.

    layers: [m] exit layers that have a probe, ascending, full depth last.
    probes: [m], of the state after each, weights folded in. alone: see ALONE.
    encoder: of the prompt's vector, shared by all layers.
    encoder_weights, vote_weights: [m + 1], of no layer at all first: what is known of a prompt
        before any layer runs.
    ids: n row ids. exit_probs: [n, m] out-of-fold probability of the gold label; is_right: [n, m]
        whether that label is the most probable one. certainties: [n] within 0..1, highest
        probability that the front end alone gives a label.
    """

    layers: tuple[int, ...]
    probes: tuple[Probe, ...]
    alone: Probe
    encoder: Probe
    encoder_weights: NDArray[np.float32]
    vote_weights: NDArray[np.float32]
    ids: tuple[str, ...]
    exit_probs: NDArray[np.float32]
    is_right: NDArray[np.bool_]
    certainties: NDArray[np.float32]

    @property
    def num_labels(self) -> int:
        return len(self.encoder.bias)

    @cached_property
    def digest(self) -> str:
        """Of the probes (12 hex)."""
        return hashlib.sha256(packed(self.named_probes("task"))).hexdigest()[:12]

    def named_probes(self, task: str) -> dict[str, Probe]:
        """By the name that a request leaves through them by: TASK/LAYER, TASK/alone."""
        by_layer = zip(self.layers, self.probes, strict=True)
        return {f"{task}/{layer}": p for layer, p in by_layer} | {f"{task}/{ALONE}": self.alone}

    def front_scores(self, layer: int | None, vector: NDArray, log_vote: Array) -> Array:
        """[num_labels] what encoder and vote add at an exit layer; None: without any layer.

        vector: [dimension] of the prompt; log_vote: [num_labels], see `log_votes`.
        """
        at = 0 if layer is None else 1 + self.layers.index(layer)
        own = self.encoder.scores(vector.astype(np.float32))
        return mixed([own, log_vote], [self.encoder_weights[at], self.vote_weights[at]])

    def certainty(self, vector: NDArray, log_vote: Array) -> float:
        """Highest probability that the front end alone gives a label."""
        return float(softmax(self.front_scores(None, vector, log_vote)).max())

    def places(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """[len(ids)] where each of these rows stands in the fit; -1 for rows that came later."""
        places = {row_id: place for place, row_id in enumerate(self.ids)}
        return np.array([places.get(row_id, -1) for row_id in ids], np.int64)

    def spread(self, values: NDArray, num_layers: int) -> NDArray[np.float32]:
        """[n, m] by layer that has a probe -> [n, 1, num_layers], 0 at layers without one."""
        found = np.zeros((len(values), 1, num_layers), np.float32)
        found[:, 0, np.array(self.layers) - 1] = values
        return found

    def to_bytes(self) -> bytes:
        tensors = {
            "layers": np.array(self.layers, np.int32),
            "weight": np.stack([probe.weight for probe in self.probes]),
            "bias": np.stack([probe.bias for probe in self.probes]),
            "alone.weight": self.alone.weight,
            "alone.bias": self.alone.bias,
            "encoder.weight": self.encoder.weight,
            "encoder.bias": self.encoder.bias,
            "encoder_weights": self.encoder_weights,
            "vote_weights": self.vote_weights,
            "ids": np.array([list(bytes.fromhex(row_id)) for row_id in self.ids], np.uint8),
            "exit_probs": self.exit_probs,
            "is_right": self.is_right,
            "certainties": self.certainties,
        }
        return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> TaskFit:
        """Raises TableError for bytes that `to_bytes` did not make."""
        try:
            read = load(data)
            return cls(
                tuple(read["layers"].tolist()),
                tuple(map(Probe, read["weight"], read["bias"])),
                Probe(read["alone.weight"], read["alone.bias"]),
                Probe(read["encoder.weight"], read["encoder.bias"]),
                read["encoder_weights"],
                read["vote_weights"],
                tuple(row.tobytes().hex() for row in read["ids"]),
                read["exit_probs"],
                read["is_right"],
                read["certainties"],
            )
        except (SafetensorError, LookupError, ValueError) as e:
            raise TableError(f"a fit cannot be read ({type(e).__name__}: {e})") from e


def why_not(golds: NDArray[np.int32], ids: Sequence[str]) -> str | None:
    """Why these rows allow no fit; None if they do."""
    if len(golds) < FEWEST_ROWS:
        return f"it has {len(golds)} rows, and probes need at least {FEWEST_ROWS}"
    folds = np.array([fold_of(row_id) for row_id in ids])
    if any(len(np.unique(golds[folds != fold])) < 2 for fold in range(FOLDS)):
        return "its rows have only one label, apart from a few"
    return None


# BLAS threads that wait for each other spin: beside another job they ran 300 times slower.
@threadpool_limits.wrap(limits=1)
def fit_task(
    layers: Sequence[int],
    states: Callable[[int], Features],
    vectors: NDArray[np.float32],
    golds: NDArray[np.int32],
    ids: Sequence[str],
    num_labels: int,
    done: Callable[[int], None] = lambda _layer: None,
) -> TaskFit:
    """Fits a task's rows, for which `why_not` has nothing to say.

    states: of a layer, [n, hidden_size], the last prompt position's after the final norm.
    vectors: [n, dimension] L2-normalised; golds: [n] label indices. done: called after each layer.
    Raises ValueError for states or vectors that are not finite.
    """
    folds = np.array([fold_of(row_id) for row_id in ids])
    encoder, encoder_scores = logistic(vectors, golds, num_labels, folds)
    front: list[NDArray] = [encoder_scores, _votes(vectors, golds, num_labels)]
    weights = [fitted_weights(front, golds)]
    certainties = softmax(mixed(front, weights[0])).max(axis=1)
    probes, exit_probs, is_right = [], [], []
    for layer in layers:
        probe, scores = _fitted(states(layer), golds, num_labels, folds, STATE_STRENGTHS)
        state_weight, *front_weights = fitted_weights([scores, *front], golds)
        weights.append(np.array(front_weights))
        probes.append(_louder(probe, state_weight))
        probabilities = _held_out([scores, *front], golds, folds)
        exit_probs.append(probabilities[np.arange(len(golds)), golds])
        is_right.append(probabilities.argmax(axis=1) == golds)
        done(layer)
    by_layer = np.stack(weights).astype(np.float32)
    return TaskFit(
        tuple(layers),
        tuple(probes),
        _louder(probe, fitted_weights([scores], golds)[0]),
        encoder,
        by_layer[:, 0],
        by_layer[:, 1],
        tuple(ids),
        np.stack(exit_probs, axis=1).astype(np.float32),
        np.stack(is_right, axis=1),
        certainties.astype(np.float32),
    )


def probe_set(fits: Mapping[str, TaskFit]) -> tuple[str, bytes] | None:
    """(id, packed probes) of all tasks, as workers take them; None without any fit."""
    probes: dict[str, Probe] = {}
    for task, fit in fits.items():
        probes |= fit.named_probes(task)
    if not probes:
        return None
    data = packed(probes)
    return hashlib.sha256(data).hexdigest()[:16], data


def _fitted(
    features: Features,
    golds: NDArray[np.int32],
    num_labels: int,
    folds: NDArray[np.int64],
    strengths: Sequence[float],
) -> tuple[Probe, NDArray[np.float32]]:
    """The probe of all rows by the best strength, and each row's out-of-fold scores."""
    ridge = FoldedRidge(features, golds, num_labels, folds)
    found = {}
    for strength in strengths:
        scores = ridge.out_of_fold(strength)
        found[strength] = scores, log_likelihood(scores * fitted_weights([scores], golds)[0], golds)
    best = max(strengths, key=lambda strength: found[strength][1])
    return ridge.probe(best), found[best][0]


def _held_out(
    voices: Sequence[NDArray], golds: NDArray[np.int32], folds: NDArray[np.int64]
) -> Array:
    """[n, num_labels] probabilities, by weights that were fitted without the row's fold."""
    probabilities = np.empty(voices[0].shape)
    for fold in range(FOLDS):
        of_fold = folds == fold
        weights = fitted_weights([voice[~of_fold] for voice in voices], golds[~of_fold])
        probabilities[of_fold] = softmax(mixed([voice[of_fold] for voice in voices], weights))
    return probabilities


def _votes(vectors: NDArray[np.float32], golds: NDArray[np.int32], num_labels: int) -> Array:
    """[n, num_labels] what its nearest other rows vote on each row."""
    own, voters = np.arange(len(vectors)), np.arange(len(vectors))
    if len(vectors) > ALL_VOTE:
        voters = np.sort(np.random.default_rng(0).choice(len(vectors), SAMPLED_VOTERS, False))
        own = np.full(len(vectors), -1)
        own[voters] = np.arange(len(voters))
    return neighbour_votes(vectors, own, vectors[voters], golds[voters], num_labels)


def _louder(probe: Probe, weight: float) -> Probe:
    return Probe(
        (probe.weight * weight).astype(np.float32), (probe.bias * weight).astype(np.float32)
    )
