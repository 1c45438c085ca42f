"""Embeds key texts, with sentence-transformers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from raee_serve.checkpoints import resolve_encoder
from raee_serve.errors import BindingError, CheckpointError, RaeeError
from raee_serve.retrieval.onnx_model import OnnxTransformer, exported
from raee_serve.retrieval.resources import BATCH_SIZE
from raee_serve.table.schema import EncoderIdentity

MIN_SIMILARITY = 0.95
"""Least cosine similarity of a back end's vectors to torch's, with which tables are built."""
CHARS_PER_TOKEN = 64
"""Of a text that reads as one, a token has a tenth of that."""
PROBES = (
    "a gripping and moving film",
    "the battery died after two days, and nobody answered my letters",
    "Who wrote the first novel that was printed in this country?",
    "The committee will meet again on 14 March to vote on the budget, its chairman said.",
)
"""Texts on which back ends are compared."""


class Encoder:
    """A sentence-transformers model on the CPU, its vectors L2-normalised.

    threads: used while it encodes; beside a busy engine every further one is taken from the
    engine's worker. backend: what runs the transformer, a key of BATCH_SIZE.
    """

    def __init__(self, name: str, threads: int = 1, backend: str = "torch") -> None:
        """Raises CheckpointError if `name` cannot be loaded, RaeeError for an unknown back end or
        one whose packages are missing, BindingError for one whose vectors differ from torch's."""
        if backend not in BATCH_SIZE:
            raise RaeeError(f"encoder back end {backend!r}; allowed: {', '.join(BATCH_SIZE)}")
        self._model = load_model(name)
        dimension = self._model.get_embedding_dimension()
        if dimension is None:
            raise CheckpointError(f"encoder {name!r} does not state the dimension of its vectors")
        self.name = name
        self.threads = threads
        self.dimension = dimension
        self.backend = "torch"
        self._max_chars = _most_chars(self._model.max_seq_length)
        self._torch_identity: EncoderIdentity | None = None
        if backend != "torch":
            self._change_backend(backend)

    def identity(self) -> EncoderIdentity:
        """Name, dimension and a hash of all weights; what a table is bound to.

        The same for every back end: their vectors have been found to be close to torch's.
        """
        return self._torch_identity or self._identify()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[len(texts), dimension] float32, every row of length 1.

        A text beyond the model's own limit is represented by its beginning; what is far beyond is
        not even read. Raises RaeeError if the model gives vectors of another dimension or not
        finite.
        """
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        with _torch_threads(self.threads):
            vectors = self._model.encode(  # takes texts of similar length together
                [text[: self._max_chars] for text in texts],
                batch_size=BATCH_SIZE[self.backend],
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        if vectors.shape != (len(texts), self.dimension):
            raise RaeeError(
                f"encoder {self.name} gave vectors {vectors.shape} for {len(texts)} texts, "
                f"expected dimension {self.dimension}"
            )
        if not np.isfinite(vectors).all():
            raise RaeeError(f"encoder {self.name} gave a vector that is not finite")
        return vectors.astype(np.float32)

    def _identify(self) -> EncoderIdentity:
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        return EncoderIdentity(self.name, self.dimension, digest.hexdigest())

    def _change_backend(self, backend: str) -> None:
        """Run the transformer otherwise from here on, after a look at what comes of it."""
        transformer: Any = self._model[0]
        if not hasattr(getattr(transformer, "model", None), "set_attn_implementation"):
            raise RaeeError(
                f"encoder {self.name} has no transformer ({type(transformer).__name__}), "
                f"so back end {backend!r} is not for it; use 'torch'"
            )
        expected = self.encode(PROBES)
        self._torch_identity = identity = self._identify()
        file = exported(
            transformer.model,
            self._model.preprocess(list(PROBES)),
            identity.weights[:32],
            int8=backend == "onnx-int8",
        )
        transformer.model = OnnxTransformer(file, transformer.model.config, self.threads)
        self.backend = backend
        similarity = float((self.encode(PROBES) * expected).sum(axis=1).min())
        if similarity < MIN_SIMILARITY:
            raise BindingError(
                f"encoder {self.name}: back end {backend!r} gives vectors whose cosine similarity "
                f"to those of 'torch', with which tables are built, is {similarity:.3f}; at least "
                f"{MIN_SIMILARITY} is needed; use 'torch'"
            )


def _most_chars(window: float | None) -> int | None:
    """Of a text, all that a model with a window of so many tokens can see; None without one."""
    return None if window is None or math.isinf(window) else int(window) * CHARS_PER_TOKEN


def load_model(name: str) -> SentenceTransformer:
    """Encoder `name` as `resolve_encoder` takes it. Raises CheckpointError if it cannot be."""
    path = resolve_encoder(name)
    try:
        return SentenceTransformer(path, device="cpu")
    except (OSError, ValueError, KeyError) as e:
        raise CheckpointError(f"cannot load encoder {name!r} from {path}: {e}") from e


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
