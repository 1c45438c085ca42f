"""Embeds key texts. The only module that imports sentence_transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from raee_serve.checkpoints import resolve_encoder
from raee_serve.errors import CheckpointError, RaeeError
from raee_serve.table.schema import EncoderIdentity


class Encoder:
    """A sentence-transformers model on the CPU, its vectors L2-normalised.

    threads: torch threads while it encodes; beside a busy engine every further one is taken from
    the engine's worker.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        """Raises CheckpointError if `name` cannot be loaded."""
        path = resolve_encoder(name)
        try:
            self._model = SentenceTransformer(path, device="cpu")
        except (OSError, ValueError, KeyError) as e:
            raise CheckpointError(f"cannot load encoder {name!r} from {path}: {e}") from e
        dimension = self._model.get_embedding_dimension()
        if dimension is None:
            raise CheckpointError(f"encoder {name!r} does not state the dimension of its vectors")
        self.name = name
        self.threads = threads
        self.dimension = dimension

    def identity(self) -> EncoderIdentity:
        """Name, dimension and a hash of all weights; what a table is bound to."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        return EncoderIdentity(self.name, self.dimension, digest.hexdigest())

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[len(texts), dimension] float32, every row of length 1.

        A text beyond the model's own limit is represented by its beginning. Raises RaeeError if
        the model gives vectors of another dimension or not finite.
        """
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        with _torch_threads(self.threads):
            vectors = self._model.encode(
                list(texts), normalize_embeddings=True, show_progress_bar=False
            )
        if vectors.shape != (len(texts), self.dimension):
            raise RaeeError(
                f"encoder {self.name} gave vectors {vectors.shape} for {len(texts)} texts, "
                f"expected dimension {self.dimension}"
            )
        if not np.isfinite(vectors).all():
            raise RaeeError(f"encoder {self.name} gave a vector that is not finite")
        return vectors.astype(np.float32)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
