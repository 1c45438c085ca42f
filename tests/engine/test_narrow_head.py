"""Steps whose requests are limited to few tokens compute these logits alone, and say the same."""

import pytest

from raee_serve.engine.models import truncated
from tests import tiny
from tests.engine.engines import generate_at, sampling_params, tiny_engine
from tests.engine.workload import mixed_requests

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_TOKENS = 6, 4
ALLOWED = [7, 90, 300, 511]
LIMITED = {"allowed_token_ids": ALLOWED}
SETTINGS = {
    "greedy": {},
    "biased": {"logit_bias": {90: 0.3, 300: -0.2}},
    "sampled": {"temperature": 1.3, "seed": 5, "top_k": 3, "repetition_penalty": 1.4},
}
MODELS = {"llama": tiny.tiny_llama, "gemma2": tiny.tiny_gemma2}  # this one caps its logits


@pytest.fixture(scope="module", params=MODELS)
def engine(request, tmp_path_factory):
    model = tiny.with_random_norms(MODELS[request.param](NUM_LAYERS, **tiny.ENGINE_SIZES))
    with tiny_engine(tiny.saved(model, tmp_path_factory.mktemp("tiny") / "model")) as llm:
        yield llm


@pytest.fixture
def narrowed(monkeypatch):
    """The tokens of each head that was narrowed."""
    seen = []

    def spy(processor, head, tokens, hidden):
        seen.append(tokens)
        return narrow(processor, head, tokens, hidden)

    narrow = truncated.narrow_logits
    monkeypatch.setattr(truncated, "narrow_logits", spy)
    return seen


@pytest.fixture
def generate(engine):
    requests = mixed_requests(NUM_LAYERS, tiny.ENGINE_SIZES["vocab_size"], first_token=2)
    prompts, depths = [r.prompt for r in requests], [r.exit_layer for r in requests]

    def run(max_tokens=NUM_TOKENS, **sampling):
        return generate_at(engine, prompts, depths, max_tokens=max_tokens, **sampling)

    return run


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_limited_requests_say_what_they_say_with_a_whole_head(generate, narrowed, sampling):
    answers = generate(**LIMITED, **sampling)
    assert narrowed and set(narrowed) == {tuple(ALLOWED)}
    narrowed.clear()
    # For log-probabilities all logits are needed.
    assert generate(**LIMITED, logprobs=1, **sampling) == answers
    assert not narrowed
    assert len({tuple(tokens) for tokens in answers}) > 4


def test_a_request_that_may_say_anything_keeps_the_head_whole(engine, narrowed):
    prompts = [[2, 5, 9], [2, 8]]
    fields = {"temperature": 0.0, "max_tokens": 2, "ignore_eos": True, "detokenize": False}
    free, limited = (
        generate_at(engine, [prompt], [3], max_tokens=2, **limits)[0]
        for prompt, limits in zip(prompts, [{}, LIMITED], strict=True)
    )
    assert len(narrowed) == 2
    narrowed.clear()
    both = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [sampling_params({**fields, **more}, exit_layer=3) for more in ({}, LIMITED)],
        use_tqdm=False,
    )
    assert [list(o.outputs[0].token_ids) for o in both] == [free, limited]
    assert not narrowed


def test_a_scored_prompt_or_too_many_tokens_keep_the_head_whole(generate, narrowed):
    generate(**LIMITED, prompt_logprobs=1, max_tokens=1)
    generate(allowed_token_ids=list(range(100)))
    assert not narrowed
