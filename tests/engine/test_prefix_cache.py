"""Invariant 4 in vLLM's own prefix cache: blocks of one depth are never read at another."""

import random

import pytest
from vllm import SamplingParams

from raee_serve.engine.settings import engine_options, exit_args
from tests.engine.conftest import ServedModel
from tests.engine.engines import tiny_engine
from tests.engine.reference import greedy_mismatches
from tests.tiny import ENGINE_SIZES, saved, tiny_gemma3, tiny_llama

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_TOKENS = 6, 8
CACHE_BLOCK = 128
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "detokenize": False}
MODELS = {"llama": (tiny_llama, {}), "gemma3": (tiny_gemma3, {"sliding_window": 64})}


@pytest.fixture(scope="module", params=MODELS)
def served(request, tmp_path_factory):
    make, config = MODELS[request.param]
    model = make(NUM_LAYERS, **ENGINE_SIZES, **config)
    checkpoint = saved(model, tmp_path_factory.mktemp("tiny") / "model")
    with tiny_engine(checkpoint, **engine_options(kv_segments=1)) as llm:
        yield ServedModel(checkpoint, llm, NUM_LAYERS, ENGINE_SIZES["vocab_size"], first_token=2)


def run(served, prompt, exit_layer, **sampling):
    """One request on its own: (completions, number of prompt tokens found in the cache)."""
    params = SamplingParams(**GREEDY | sampling, extra_args=exit_args(exit_layer))
    [output] = served.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    return [list(o.token_ids) for o in output.outputs], output.num_cached_tokens


@pytest.fixture
def prompt(served, request):
    """Long enough to fill cache blocks, and another one in every test."""
    rng = random.Random(request.node.name)
    body = [rng.randrange(10, served.vocab_size) for _ in range(3 * CACHE_BLOCK + 20)]
    return [served.first_token, *body]


def test_depths_do_not_share_blocks_and_stay_right(served, prompt):
    shallow, deep = served.num_layers // 3, served.num_layers
    for depth in (shallow, deep, served.num_layers // 2, shallow - 1):
        [tokens], cached = run(served, prompt, depth)
        assert cached == 0
        assert greedy_mismatches(served.checkpoint, depth, [prompt], [tokens]) == []


def test_one_depth_reuses_its_own_blocks(served, prompt):
    depth = served.num_layers // 2
    first, _ = run(served, prompt, depth)
    again, cached = run(served, prompt, depth)
    assert cached >= 2 * CACHE_BLOCK
    assert again == first
    assert greedy_mismatches(served.checkpoint, depth, [prompt], again) == []


def test_samples_of_one_request_share_its_depth(served, prompt):
    depth = served.num_layers // 2
    # vLLM refuses n > 1 at temperature 0; the best of one token is greedy all the same.
    completions, _ = run(served, prompt, depth, n=2, temperature=1.0, top_k=1)
    assert len(completions) == 2
    wrong = greedy_mismatches(served.checkpoint, depth, [prompt] * 2, completions)
    assert wrong == []


@pytest.mark.parametrize("bad", [0, -3, 10_000, "12", True, None, 2.5])
def test_unusable_exit_layer_runs_full_depth_and_harms_nobody(served, prompt, bad):
    outputs = served.llm.generate(
        [{"prompt_token_ids": prompt}] * 2,
        [SamplingParams(**GREEDY, extra_args={"raee_exit_layer": bad}), SamplingParams(**GREEDY)],
        use_tqdm=False,
    )
    smuggled, plain = (list(o.outputs[0].token_ids) for o in outputs)
    assert smuggled == plain
