"""An encoder cut to its first layers, and a linear map from there to what all of them would give.

The same idea as an exit shortcut's: ridge regression, here of a text's normalised vector on the
pooled state after the last layer that is left. What comes out is an ordinary sentence-transformers
model, with vectors of its own: a table is built (or encoded anew) with the encoder it is asked by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

from raee_serve.errors import CheckpointError, RaeeError, TaskError
from raee_serve.retrieval.encoder import load_model

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the mean square of a state's features; the one with the best held-out vectors is taken."""
HELD_OUT = 4
"""One text of so many."""
FEWEST_TEXTS = 100
BATCH = 64


@dataclass(frozen=True, slots=True)
class CutReport:
    """similarity: mean cosine to the whole encoder's vectors, of held-out texts; ridge: chosen."""

    layers: int
    num_layers: int
    fitted: int
    held_out: int
    ridge: float
    similarity: float

    def __str__(self) -> str:
        return (
            f"{self.layers} of {self.num_layers} layers, fitted on {self.fitted} texts (ridge "
            f"{self.ridge:g}); mean cosine to the whole encoder's vectors {self.similarity:.3f} on "
            f"{self.held_out} others"
        )


def cut_encoder(name: str, layers: int, texts: Sequence[str], target: Path) -> CutReport:
    """Write a sentence-transformers model of the first `layers` layers of encoder `name`.

    texts: what it is to be used on, FEWEST_TEXTS or more. Raises CheckpointError if `name` cannot
    be loaded or is no transformer with pooling, RaeeError for other numbers of layers than it can
    do without, TaskError for too few texts.
    """
    if len(texts) < FEWEST_TEXTS:
        raise TaskError(f"{len(texts)} texts to fit on; at least {FEWEST_TEXTS} are needed")
    model = load_model(name)
    transformer, pooling = _transformer(model, name), model[1]
    stack = transformer.model.encoder.layer
    num_layers = len(stack)
    if not 1 <= layers < num_layers:
        raise RaeeError(
            f"--layers is {layers}; allowed for {name}, of {num_layers} layers: 1..{num_layers - 1}"
        )
    wanted = _vectors(model, texts, normalised=True)
    del stack[layers:]
    transformer.model.config.num_hidden_layers = layers
    states = _vectors(SentenceTransformer(modules=[transformer, pooling]), texts)
    dense, ridge, similarity, held_out = _fitted(states, wanted)
    modules = [transformer, pooling, dense, Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(target))
    fitted = len(texts) - held_out
    return CutReport(layers, num_layers, fitted, held_out, ridge, similarity)


def _transformer(model: SentenceTransformer, name: str) -> Any:
    transformer: Any = model[0]
    stack = getattr(getattr(getattr(transformer, "model", None), "encoder", None), "layer", None)
    if not isinstance(stack, torch.nn.ModuleList) or not isinstance(model[1], Pooling):
        raise CheckpointError(f"encoder {name!r} is no BERT-like transformer followed by pooling")
    return transformer


def _vectors(
    model: SentenceTransformer, texts: Sequence[str], *, normalised: bool = False
) -> NDArray[np.float64]:
    """[n, dimension]"""
    vectors = model.encode(
        list(texts),
        batch_size=BATCH,
        normalize_embeddings=normalised,
        show_progress_bar=True,
    )
    return vectors.astype(np.float64)


def _fitted(
    states: NDArray[np.float64], wanted: NDArray[np.float64]
) -> tuple[Dense, float, float, int]:
    """The map, its penalty, its held-out similarity, and how many were held out."""
    is_held_out = np.arange(len(states)) % HELD_OUT == 0
    inputs, outputs = states[~is_held_out], wanted[~is_held_out]
    centre, mean = inputs.mean(axis=0), outputs.mean(axis=0)
    inputs = inputs - centre
    squares, products = inputs.T @ inputs, inputs.T @ (outputs - mean)
    scale = np.trace(squares) / len(squares)

    def solved(ridge: float) -> NDArray[np.float64]:
        return np.linalg.solve(squares + ridge * scale * np.eye(len(squares)), products)

    def similarity(weight: NDArray[np.float64]) -> float:
        found = (states[is_held_out] - centre) @ weight + mean
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        return float((found * wanted[is_held_out]).sum(axis=1).mean())

    ridge = max(RIDGES, key=lambda ridge: similarity(solved(ridge)))
    weight = solved(ridge)
    dense = Dense(
        weight.shape[0],
        weight.shape[1],
        activation_function=torch.nn.Identity(),
        init_weight=torch.tensor(weight.T, dtype=torch.float32),
        init_bias=torch.tensor(mean - centre @ weight, dtype=torch.float32),
    )
    return dense, ridge, similarity(weight), int(is_held_out.sum())
