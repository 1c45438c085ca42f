"""Invariants 1 and 2: full depth is vanilla vLLM, and a depth is a model.

That the mixed batch is a real test was seen once by leaving the forward context's slot mapping
unshrunk (in `patches/v1_step.py`): rows then write their keys and values into other requests'
slots, vLLM reports no error, and all 32 requests of a like batch got wrong tokens.
"""

import pytest

from tests.engine.engines import generate_at, run_vanilla
from tests.engine.reference import mixed_mismatches
from tests.engine.workload import CHUNK, MAX_TOKENS, mixed_requests

pytestmark = pytest.mark.engine

NUM_COMPARED = 12
"""Requests that run at full depth in both engines; some of the first are prompts of 3 chunks."""


def test_mixed_depths_equal_cut_checkpoints(served):
    requests = mixed_requests(served.num_layers, served.vocab_size, served.first_token)
    prompts, depths = [r.prompt for r in requests], [r.exit_layer for r in requests]
    assert len(set(depths)) >= 8
    assert sum(len(p) > CHUNK for p in prompts) >= 8

    tokens = generate_at(served.llm, prompts, depths, max_tokens=MAX_TOKENS)

    assert mixed_mismatches(served.checkpoint, depths, prompts, tokens) == []


def test_full_depth_equals_vanilla(served):
    requests = mixed_requests(served.num_layers, served.vocab_size, served.first_token)
    prompts = [r.prompt for r in requests[:NUM_COMPARED]]
    full_depth = [served.num_layers] * NUM_COMPARED
    ours = generate_at(served.llm, prompts, full_depth, max_tokens=MAX_TOKENS)

    greedy = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    (vanilla,) = run_vanilla([served.checkpoint], prompts, [greedy] * NUM_COMPARED)
    assert ours == [v["completions"][0]["token_ids"] for v in vanilla]
