"""Engines shared by the tests of one checkpoint; start-up is the dear part."""

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class ServedModel:
    """A running engine with truncated execution and the checkpoint it serves."""

    checkpoint: Path
    llm: object
    num_layers: int
    vocab_size: int
    first_token: int


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def served(request):
    """The real models one after the other: a new engine starts when the last one is done."""
    from tests.engine.engines import engine_in_process

    checkpoint = request.getfixturevalue(request.param)
    with engine_in_process(checkpoint) as llm:
        config = llm.llm_engine.model_config
        tokenizer = llm.get_tokenizer()
        yield ServedModel(
            checkpoint,
            llm,
            config.get_total_num_hidden_layers(),
            config.get_vocab_size(),
            tokenizer.bos_token_id or 0,
        )
