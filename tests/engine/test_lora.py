"""Adapters in a mixed-depth batch: each row meets its own adapter in every layer it runs."""

import random

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from raee_serve.engine.settings import exit_args
from tests.engine.engines import tiny_engine
from tests.engine.reference import mixed_mismatches
from tests.tiny import ADAPTER_RANK, ENGINE_SIZES, saved, tiny_llama, write_adapter

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_REQUESTS, NUM_TOKENS = 6, 36, 10
ADAPTERS = (None, "first", "second")


def test_mixed_adapters_and_depths_equal_merged_cut_checkpoints(tmp_path):
    checkpoints = {None: saved(tiny_llama(NUM_LAYERS, **ENGINE_SIZES), tmp_path / "base")}
    for seed, name in enumerate(ADAPTERS[1:]):
        model = tiny_llama(NUM_LAYERS, **ENGINE_SIZES)
        checkpoints[name] = write_adapter(model, tmp_path / name, seed)
    loras = {n: LoRARequest(n, i, str(tmp_path / n)) for i, n in enumerate(ADAPTERS) if n}
    rng = random.Random(4)
    lengths = [rng.choice([5, 40, 300]) for _ in range(NUM_REQUESTS)]
    prompts = [[rng.randrange(5, ENGINE_SIZES["vocab_size"]) for _ in range(n)] for n in lengths]
    names = [ADAPTERS[i % 3] for i in range(NUM_REQUESTS)]
    depths = [1 + (i // 3) % NUM_LAYERS for i in range(NUM_REQUESTS)]
    greedy = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}

    # One slot more than adapters: vLLM's CPU kernels give rows without an adapter the weights in
    # the last slot, which must therefore stay empty.
    args = {"enable_lora": True, "max_loras": len(ADAPTERS), "max_lora_rank": ADAPTER_RANK}
    with tiny_engine(checkpoints[None], **args) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in prompts],
            [SamplingParams(**greedy, detokenize=False, extra_args=exit_args(d)) for d in depths],
            lora_request=[loras.get(n) for n in names],
            use_tqdm=False,
        )

    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    for name in ADAPTERS:
        of_it = [i for i, n in enumerate(names) if n == name]
        wrong = mixed_mismatches(
            checkpoints[name],
            [depths[i] for i in of_it],
            [prompts[i] for i in of_it],
            [tokens[i] for i in of_it],
        )
        assert wrong == [], f"adapter {name}"
