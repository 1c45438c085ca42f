"""Invariant 2 for every supported architecture, on random weights that each request can tell."""

import pytest

from raee_serve.engine.models import SUPPORTED
from tests import tiny
from tests.engine.engines import generate_at, tiny_engine
from tests.engine.reference import mixed_mismatches
from tests.engine.workload import mixed_requests

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_TOKENS = 6, 12
WINDOW = {"sliding_window": 64}
MODELS = {
    "GemmaForCausalLM": (tiny.tiny_gemma, {}),
    "Gemma2ForCausalLM": (tiny.tiny_gemma2, WINDOW),
    "Gemma3ForCausalLM": (tiny.tiny_gemma3, WINDOW),
    "LlamaForCausalLM": (tiny.tiny_llama, {}),
    "MistralForCausalLM": (tiny.tiny_mistral, {}),
}


@pytest.fixture
def requests():
    return mixed_requests(NUM_LAYERS, tiny.ENGINE_SIZES["vocab_size"], first_token=2)


def test_every_supported_architecture_is_here():
    assert MODELS.keys() == SUPPORTED.keys()


@pytest.mark.parametrize("architecture", MODELS)
def test_mixed_depths_equal_cut_checkpoints(architecture, tmp_path, requests):
    check(architecture, tmp_path / "model", requests)


def test_sliding_and_full_attention_in_one_kv_group(tmp_path, requests):
    check("Gemma3ForCausalLM", tmp_path / "model", requests, disable_hybrid_kv_cache_manager=True)


def check(architecture, directory, requests, **engine_args):
    make, config = MODELS[architecture]
    model = tiny.with_random_norms(make(NUM_LAYERS, **tiny.ENGINE_SIZES, **config))
    checkpoint = tiny.saved(model, directory)
    prompts, depths = [r.prompt for r in requests], [r.exit_layer for r in requests]

    with tiny_engine(checkpoint, **engine_args) as llm:
        tokens = generate_at(llm, prompts, depths, max_tokens=NUM_TOKENS)

    assert len({tuple(t) for t in tokens}) > len(tokens) // 2  # the weights do say something
    assert mixed_mismatches(checkpoint, depths, prompts, tokens) == []
