"""Engines shared by the tests of one checkpoint; start-up is the dear part."""

import os
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


@pytest.fixture(scope="session", autouse=True)
def cpu_engine_environment():
    """All cores for the worker (nothing else runs), and the model runner we support."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"


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
