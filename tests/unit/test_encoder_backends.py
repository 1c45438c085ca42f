"""What runs the encoder may be chosen; its vectors stay those that tables are built with."""

import numpy as np
import pytest

from raee_serve.errors import BindingError, RaeeError
from raee_serve.retrieval import encoder as encoder_module
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.resources import BATCH_SIZE, DEFAULT_BACKEND

pytestmark = pytest.mark.unit

TEXTS = [
    "a film",
    "The dialogue is witty, the cast is excellent, and yet it drags on for most of its three hours",
    "terrible",
    "What is the tallest mountain on any continent that is not Asia?",
]


@pytest.fixture(scope="module")
def torch_encoder():
    return Encoder("minilm")


@pytest.mark.parametrize(("backend", "least"), [("onnx", 0.99999), ("onnx-int8", 0.97)])
def test_vectors_are_close_to_torchs_and_the_identity_is_the_same(torch_encoder, backend, least):
    encoder = Encoder("minilm", backend=backend)
    expected, vectors = torch_encoder.encode(TEXTS), encoder.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (expected * vectors).sum(axis=1).min() > least
    assert encoder.identity() == torch_encoder.identity()
    for text, vector in zip(TEXTS, vectors, strict=True):  # whatever company a text is in
        np.testing.assert_allclose(encoder.encode([text])[0], vector, atol=1e-5)


def test_a_back_end_whose_vectors_differ_is_refused(monkeypatch):
    monkeypatch.setattr(encoder_module, "MIN_SIMILARITY", 0.9999)
    with pytest.raises(BindingError, match=r"gives vectors whose cosine .* use 'torch'"):
        Encoder("minilm", backend="onnx-int8")


def test_unknown_back_ends_are_named():
    with pytest.raises(RaeeError, match="'jax'; allowed: torch, onnx, onnx-int8"):
        Encoder("minilm", backend="jax")
    assert DEFAULT_BACKEND in BATCH_SIZE


def test_what_is_far_beyond_the_window_is_not_read(torch_encoder, monkeypatch):
    words = "a film that begins well and then goes on for most of its three hours " * 100
    whole = torch_encoder.encode([words])
    seen: list[str] = []
    encode = torch_encoder._model.encode

    def noting(texts, **settings):
        seen.extend(texts)
        return encode(texts, **settings)

    monkeypatch.setattr(torch_encoder._model, "encode", noting)
    np.testing.assert_array_equal(torch_encoder.encode([words * 1000]), whole)
    assert len(seen[0]) == 256 * encoder_module.CHARS_PER_TOKEN < len(words * 1000)
