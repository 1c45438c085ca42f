"""What a request may ask of sampling and output works at its exit layer as at a cut checkpoint's.

The reference is vanilla vLLM on the cut checkpoint, asked for the same things.
"""

import random

import pytest

from raee_serve.cut import cut_checkpoint
from tests.engine.engines import outcome, run_vanilla, sampling_params, tiny_args, tiny_engine
from tests.tiny import ENGINE_SIZES, WITH_TOKENIZER, tiny_llama, tokenized

pytestmark = pytest.mark.engine

NUM_LAYERS = 6
DEPTHS = (2, 5, NUM_LAYERS)
BUDGET = 1024
"""Tokens a step: less than the prompts together, so that some come in chunks."""
SAMPLED = {"temperature": 0.9, "seed": 11}
CASES = {
    "greedy": {},
    "logprobs": {"logprobs": 4},
    "prompt_logprobs": {"prompt_logprobs": 3},
    "choice": {"structured_outputs": {"choice": ["red", "green", "blue"]}},
    "json": {
        "structured_outputs": {
            "json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        }
    },
    "regex": {"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}},
    "logit_bias": {"logit_bias": {"700": 90.0, "701": 89.0}},
    "allowed_token_ids": {"allowed_token_ids": [500, 600, 700, 800], "logprobs": 4},
    "bad_words": {"bad_words": ["the", "a"]},
    "stop_strings": {"stop": ["e", "o"], "include_stop_str_in_output": True},
    "stop_token_ids": {"stop_token_ids": list(range(100, 40000)), "min_tokens": 4},
    "seed": SAMPLED,
    "top_k_and_p": {**SAMPLED, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
    "penalties": {
        "presence_penalty": 1.0,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.4,
    },
    "n": {**SAMPLED, "n": 3},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, smollm2):
    model = tiny_llama(NUM_LAYERS, **{**ENGINE_SIZES, **WITH_TOKENIZER})
    return tokenized(model, tmp_path_factory.mktemp("tiny") / "llama", smollm2)


@pytest.fixture(scope="module")
def prompts():
    """One per case; some are long, the seeded ones together longer than a step."""
    rng = random.Random(5)
    lengths = [
        300 if i % 4 == 1 or "seed" in case else 20 + i for i, case in enumerate(CASES.values())
    ]
    return [[rng.randrange(10, WITH_TOKENIZER["vocab_size"]) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="module")
def fields():
    """Sampling parameters per case."""
    return [{"temperature": 0.0, "max_tokens": 14, **case} for case in CASES.values()]


@pytest.fixture(scope="module")
def ours(checkpoint, prompts, fields):
    """Outcomes by depth and case: one batch, all cases at every depth, prompts in chunks.

    Vanilla's CPU runner stops at a chunk that ends before a seeded prompt does.
    """
    asked = [(i, d) for i in range(len(CASES)) for d in DEPTHS]
    params = [sampling_params(fields[i], exit_layer=d) for i, d in asked]
    inputs = [{"prompt_token_ids": prompts[i]} for i, _ in asked]
    with tiny_engine(checkpoint, max_num_batched_tokens=BUDGET) as llm:
        outputs = llm.generate(inputs, params, use_tqdm=False)
    found = {d: {} for d in DEPTHS}
    for (i, depth), output in zip(asked, outputs, strict=True):
        found[depth][list(CASES)[i]] = outcome(output)
    return found


@pytest.fixture(scope="module")
def vanilla(checkpoint, prompts, fields, tmp_path_factory):
    """Outcomes by depth and case of vanilla vLLM on the cut checkpoints."""
    scratch = tmp_path_factory.mktemp("cut")
    cuts = [cut_checkpoint(checkpoint, depth, scratch / str(depth)) for depth in DEPTHS]
    args = {**tiny_args(cuts[0]), "max_num_batched_tokens": sum(map(len, prompts)) * 2}
    found = zip(DEPTHS, run_vanilla(cuts, prompts, fields, **args), strict=True)
    return {depth: dict(zip(CASES, outcomes, strict=True)) for depth, outcomes in found}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("case", CASES)
def test_feature_equals_the_cut_checkpoint(case, depth, ours, vanilla):
    found, expected = ours[depth][case], vanilla[depth][case]
    assert without_logprobs(found) == without_logprobs(expected)
    for own, reference in zip(logprobs(found), logprobs(expected), strict=True):
        assert own == pytest.approx(reference, abs=1e-3)


def test_depths_answer_differently(ours):
    """Else the comparison above would say nothing about depth."""
    greedy = [ours[d]["greedy"]["completions"][0]["token_ids"] for d in DEPTHS]
    assert len({tuple(tokens) for tokens in greedy}) == len(DEPTHS)


def without_logprobs(outcome):
    return [{k: v for k, v in c.items() if k != "logprobs"} for c in outcome["completions"]]


def logprobs(outcome):
    """The log-probabilities of each position, prompt and completion."""
    lists = [outcome["prompt_logprobs"], *(c["logprobs"] for c in outcome["completions"])]
    return [position for positions in lists for position in positions or []]
