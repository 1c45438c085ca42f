"""Invariant 4 in the prefix cache: blocks of one depth are never read at another."""

import random

import pytest
from vllm import SamplingParams

from raee_serve.engine.settings import exit_args
from tests.engine.reference import greedy_mismatches

pytestmark = pytest.mark.engine

NUM_TOKENS = 8
CACHE_BLOCK = 128


def run(served, prompt, exit_layer, **sampling):
    """One request on its own: (completions, number of prompt tokens found in the cache)."""
    greedy = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    params = SamplingParams(**greedy | sampling, extra_args=exit_args(exit_layer))
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
    params = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    outputs = served.llm.generate(
        [{"prompt_token_ids": prompt}] * 2,
        [SamplingParams(**params, extra_args={"raee_exit_layer": bad}), SamplingParams(**params)],
        use_tqdm=False,
    )
    smuggled, plain = (list(o.outputs[0].token_ids) for o in outputs)
    assert smuggled == plain
