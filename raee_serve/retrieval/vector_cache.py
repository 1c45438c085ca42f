"""Vectors of texts embedded lately: prompts repeat, and embedding is most of a look-up's time."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

CAPACITY = 4096
"""Texts remembered, by their digests; with 384 dimensions 6 MB of vectors."""


class Encodes(Protocol):
    """What `Encoder` does."""

    dimension: int

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


class VectorCache:
    """An encoder that embeds each text once while it remembers it; not for several threads.

    hits, misses: texts asked for so far that were, and were not, remembered.
    """

    def __init__(self, encoder: Encodes, capacity: int = CAPACITY) -> None:
        self._encoder = encoder
        self._capacity = capacity
        self._vectors: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self.hits = self.misses = 0

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `Encoder.encode`: [len(texts), dimension]; the least recently used are forgotten."""
        if not texts:
            return np.empty((0, self._encoder.dimension), np.float32)
        names = [_digest(text) for text in texts]
        by_name = dict(zip(names, texts, strict=True))
        new = {name: text for name, text in by_name.items() if name not in self._vectors}
        self.misses += len(new)
        self.hits += len(texts) - len(new)
        found = {name: self._vectors[name] for name in by_name if name not in new}
        found |= dict(zip(new, self._encoder.encode([*new.values()]), strict=True)) if new else {}
        for name, vector in found.items():
            self._vectors[name] = vector
            self._vectors.move_to_end(name)
        while len(self._vectors) > self._capacity:
            self._vectors.popitem(last=False)
        return np.stack([found[name] for name in names])


def _digest(text: str) -> bytes:
    """What a text is remembered by: clients choose how long texts are."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
