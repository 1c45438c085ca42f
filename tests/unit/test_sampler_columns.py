"""How many columns the sampler needs for a request that leaves through a probe."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from raee_serve_patches import sampler_columns
from raee_serve_patches.sampler_columns import SamplerColumns

pytestmark = pytest.mark.unit

VOCAB = 1000


def columns(processors=None):
    model = SimpleNamespace(get_vocab_size=lambda: VOCAB, logits_processors=processors)
    return SamplerColumns(SimpleNamespace(model_config=model))


@pytest.mark.parametrize(
    ("sampling", "needed"),
    [
        ({}, 0),
        ({"temperature": 0.0}, 0),
        ({"temperature": 0.7, "seed": 1, "top_p": 0.9, "min_p": 0.1, "n": 3}, 0),
        ({"logprobs": 5}, 5),
        ({"logprobs": 0}, 0),
        ({"logprobs": 2000}, VOCAB),
        ({"top_k": VOCAB}, 0),
        ({"top_k": 1}, VOCAB),
        ({"logprobs": -1}, VOCAB),
        ({"logprob_token_ids": [3]}, VOCAB),
        ({"allowed_token_ids": [3]}, VOCAB),
        ({"logit_bias": {3: 1.0}}, VOCAB),
        ({"bad_words": ["no"]}, VOCAB),
        ({"min_tokens": 1}, VOCAB),
        ({"presence_penalty": 0.1}, VOCAB),
        ({"frequency_penalty": -0.1}, VOCAB),
        ({"repetition_penalty": 1.1}, VOCAB),
        ({"thinking_token_budget": 0}, VOCAB),
        ({"structured_outputs": StructuredOutputsParams(choice=["a"])}, VOCAB),
    ],
    ids=str,
)
def test_what_is_looked_up_by_token_needs_all(sampling, needed):
    assert columns().needed(SamplingParams(**sampling)) == needed


def test_processors_of_others_get_all_columns(monkeypatch):
    assert columns(["some.Processor"]).needed(SamplingParams()) == VOCAB
    monkeypatch.setattr(sampler_columns, "entry_points", lambda group: [group])
    assert columns().needed(SamplingParams()) == VOCAB
