"""Fixtures that several unit tests share."""

import pytest
from transformers import AutoTokenizer

from raee_serve.retrieval.encoder import Encoder


@pytest.fixture
def uri(tmp_path) -> str:
    """Where an exit table may be made."""
    return str(tmp_path / "table")


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """MiniLM by torch, as tables are built with."""
    return Encoder("minilm")


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)
