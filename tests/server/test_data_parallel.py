"""Two engines behind one server: each request runs at its own depth whichever takes it."""

import pytest
from openai import OpenAI

from raee_serve.evaluation.server_process import running_server
from tests.engine.reference import mixed_mismatches
from tests.engine.workload import mixed_requests
from tests.tiny import ENGINE_SIZES, WITH_TOKENIZER, tiny_llama, tokenized

pytestmark = pytest.mark.server

NUM_LAYERS, NUM_TOKENS = 6, 8


def test_two_engines_equal_cut_checkpoints(tmp_path, smollm2):
    model = tiny_llama(NUM_LAYERS, **{**ENGINE_SIZES, **WITH_TOKENIZER})
    checkpoint = tokenized(model, tmp_path / "model", smollm2)
    requests = mixed_requests(NUM_LAYERS, WITH_TOKENIZER["vocab_size"], first_token=1)
    depths = sorted({r.exit_layer for r in requests})
    by_depth = {d: [r.prompt for r in requests if r.exit_layer == d] for d in depths}

    flags = ["--exit-layer", "full", "--data-parallel-size", "2", "--dtype", "float32"]
    with running_server(str(checkpoint), flags) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answers = {
            depth: client.completions.create(
                model=str(checkpoint),
                prompt=prompts,
                temperature=0,
                max_tokens=NUM_TOKENS,
                extra_body={
                    "raee": {"exit_layer": depth},
                    "ignore_eos": True,
                    "return_token_ids": True,
                },
            ).choices
            for depth, prompts in by_depth.items()
        }

    for depth, choices in answers.items():
        tokens = [choice.token_ids for choice in sorted(choices, key=lambda c: c.index)]
        prompts = by_depth[depth]
        assert mixed_mismatches(checkpoint, [depth] * len(prompts), prompts, tokens) == []
