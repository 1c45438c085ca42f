"""Adapters in a mixed-depth batch: each row meets its own adapter in every layer it runs."""

import random

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from raee_serve.engine.settings import exit_args
from raee_serve.exits.probes import packed
from tests.engine.engines import outcome, tiny_engine
from tests.engine.probing import random_probes, requests_through, wrong_labels
from tests.engine.reference import mixed_mismatches
from tests.tiny import ADAPTER_RANK, ENGINE_SIZES, saved, tiny_llama, write_adapter

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_REQUESTS, NUM_TOKENS = 6, 36, 10
ADAPTERS = (None, "first", "second")
PROBES = random_probes({"two": 2, "six": 6})


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
    params = [SamplingParams(**greedy, detokenize=False, extra_args=exit_args(d)) for d in depths]
    inputs = [{"prompt_token_ids": p} for p in prompts]
    adapters = [loras.get(n) for n in names]

    # One slot more than adapters: vLLM's CPU kernels give rows without an adapter the weights in
    # the last slot, which must therefore stay empty.
    args = {"enable_lora": True, "max_loras": len(ADAPTERS), "max_lora_rank": ADAPTER_RANK}
    with tiny_engine(checkpoints[None], **args) as llm:
        outputs = llm.generate(inputs, params, lora_request=adapters, use_tqdm=False)
        llm.collective_rpc("load_probes", args=("set", packed(PROBES)))
        some = [i for i in range(NUM_REQUESTS) if i % 4 == 0]  # every adapter is among them
        chosen = [[values[i] for i in some] for values in (prompts, depths)]
        by_probe = requests_through(PROBES, "set", *chosen)
        for i, request in zip(some, by_probe, strict=True):
            params[i] = SamplingParams(
                temperature=0,
                max_tokens=1,
                logprobs=2,
                detokenize=False,
                extra_args=request.extra_args,
            )
        mixed = llm.generate(inputs, params, lora_request=adapters, use_tqdm=False)

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
        asked = [(r, mixed[i]) for i, r in zip(some, by_probe, strict=True) if i in of_it]
        outcomes = [outcome(answer) for _, answer in asked]
        assert wrong_labels(checkpoints[name], [r for r, _ in asked], PROBES, outcomes) == []
    for i in set(range(NUM_REQUESTS)) - set(some):
        assert list(mixed[i].outputs[0].token_ids) == tokens[i]
