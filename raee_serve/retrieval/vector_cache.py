"""Vectors of texts embedded lately: prompts repeat, and embedding is most of a look-up's time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

CAPACITY = 4096
"""Texts remembered; with 384 dimensions 6 MB of vectors."""


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
        self._vectors: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self.hits = self.misses = 0

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `Encoder.encode`: [len(texts), dimension]; the least recently used are forgotten."""
        if not texts:
            return np.empty((0, self._encoder.dimension), np.float32)
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        self.misses += len(new)
        self.hits += len(texts) - len(new)
        found = {text: self._vectors[text] for text in texts if text in self._vectors}
        found |= dict(zip(new, self._encoder.encode(new), strict=True)) if new else {}
        for text, vector in found.items():
            self._vectors[text] = vector
            self._vectors.move_to_end(text)
        while len(self._vectors) > self._capacity:
            self._vectors.popitem(last=False)
        return np.stack([found[text] for text in texts])
