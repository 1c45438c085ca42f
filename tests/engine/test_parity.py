"""Invariants 1 and 2: full depth is vanilla vLLM, and a depth is a model.

That the mixed batch is a real test was seen once by leaving the forward context's slot mapping
unshrunk (in `patches/v1_step.py`): rows then write their keys and values into other requests'
slots, vLLM reports no error, and all 32 requests of a like batch got wrong tokens.
"""

import pytest
from vllm import SamplingParams

from raee_serve.engine.settings import exit_args
from tests.engine.conftest import run_vanilla
from tests.engine.reference import greedy_mismatches
from tests.engine.workload import CHUNK, MAX_TOKENS, mixed_requests

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}


def generate(served, requests, exit_layers):
    """Completion tokens of each request, all in one continuous batch."""
    params = [SamplingParams(**GREEDY, extra_args=exit_args(d)) for d in exit_layers]
    prompts = [{"prompt_token_ids": r.prompt} for r in requests]
    outputs = served.llm.generate(prompts, params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


def test_mixed_depths_equal_cut_checkpoints(served):
    requests = mixed_requests(served.num_layers, served.vocab_size, served.first_token)
    assert len({r.exit_layer for r in requests}) >= 8
    assert sum(len(r.prompt) > CHUNK for r in requests) >= 8

    tokens = generate(served, requests, [r.exit_layer for r in requests])

    wrong = []
    for depth in sorted({r.exit_layer for r in requests}):
        at_depth = [i for i, r in enumerate(requests) if r.exit_layer == depth]
        prompts = [requests[i].prompt for i in at_depth]
        found = greedy_mismatches(served.checkpoint, depth, prompts, [tokens[i] for i in at_depth])
        wrong += [(depth, at_depth[i], place, behind) for i, place, behind in found]
    assert wrong == [], f"(depth, request, token, logits behind the best): {wrong}"


def test_full_depth_equals_vanilla(served):
    requests = mixed_requests(served.num_layers, served.vocab_size, served.first_token)
    ours = generate(served, requests, [served.num_layers] * len(requests))
    assert ours == run_vanilla(served.checkpoint, [r.prompt for r in requests], **GREEDY)
