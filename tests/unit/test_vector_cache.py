"""Texts are embedded once, however often and in whatever batches they are asked for."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raee_serve.retrieval.vector_cache import VectorCache

pytestmark = pytest.mark.unit


class LengthEncoder:
    """The vector of a text is its length and its first letter."""

    dimension = 2

    def __init__(self):
        self.embedded = []

    def encode(self, texts):
        assert len(texts) > 0
        self.embedded += texts
        return np.array([[len(text), ord(text[0])] for text in texts], np.float32)


@given(st.lists(st.lists(st.sampled_from(["a", "bb", "ccc", "dd", "e"]), max_size=6)))
def test_vectors_are_those_of_the_encoder(batches):
    encoder = LengthEncoder()
    cache = VectorCache(encoder, capacity=3)
    for texts in batches:
        expected = LengthEncoder().encode(texts) if texts else np.empty((0, 2))
        np.testing.assert_array_equal(cache.encode(texts), expected)
    assert cache.misses == len(encoder.embedded)
    assert cache.hits + cache.misses == sum(map(len, batches))


def test_a_text_is_embedded_once():
    encoder = LengthEncoder()
    cache = VectorCache(encoder)
    cache.encode(["a", "bb", "a"])
    cache.encode(["bb", "ccc"])
    assert encoder.embedded == ["a", "bb", "ccc"]
    assert (cache.hits, cache.misses) == (2, 3)


def test_the_least_recently_used_is_forgotten():
    encoder = LengthEncoder()
    cache = VectorCache(encoder, capacity=2)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        cache.encode([text])
    assert encoder.embedded == ["a", "bb", "ccc", "bb"]


def test_texts_are_not_kept():
    cache = VectorCache(LengthEncoder())
    text = "".join(["a"] * 100)
    before = sys.getrefcount(text)
    cache.encode([text])
    assert sys.getrefcount(text) == before + 1  # what the encoder of this test noted
