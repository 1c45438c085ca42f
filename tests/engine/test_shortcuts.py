"""Exits through shortcuts say what Transformers says with the same map before the final norm."""

import random

import pytest
from vllm import SamplingParams
from vllm.config import KVEventsConfig

from raee_serve.engine.settings import engine_options, exit_args
from raee_serve.errors import BindingError, TableError
from tests import tiny
from tests.engine.engines import generate_at, preemptions, tiny_engine
from tests.engine.reference import mixed_mismatches
from tests.engine.test_kv_events import BLOCK, stored_blocks
from tests.engine.workload import mixed_requests

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_TOKENS, LAYERS = 6, 12, (2, 3, 5)
MODELS = {
    "llama": (tiny.tiny_llama, {}),
    "gemma3": (tiny.tiny_gemma3, {"sliding_window": 64}),
}


@pytest.fixture(params=MODELS)
def checkpoint(request, tmp_path):
    make, config = MODELS[request.param]
    model = tiny.with_random_norms(make(NUM_LAYERS, **tiny.ENGINE_SIZES, **config))
    return tiny.saved(model, tmp_path / "model")


@pytest.fixture
def llama(tmp_path):
    model = tiny.with_random_norms(tiny.tiny_llama(NUM_LAYERS, **tiny.ENGINE_SIZES))
    return tiny.saved(model, tmp_path / "model")


@pytest.fixture
def stored(tmp_path):
    """Where shortcuts may be put."""
    return tmp_path / "shortcuts.safetensors"


def every_other_by_shortcut(depths):
    """Of the exits that can, so that in a batch both heads meet at each layer."""
    able = [i for i, depth in enumerate(depths) if depth in LAYERS]
    return ["shortcut" if i in able[::2] else "plain" for i in range(len(depths))]


def mapped(shortcuts, depths, heads):
    """As `mixed_mismatches` takes them."""
    exits = enumerate(zip(depths, heads, strict=True))
    return {i: shortcuts.by_layer[depth] for i, (depth, head) in exits if head == "shortcut"}


def test_a_mixed_batch_equals_the_reference(checkpoint, stored):
    shortcuts = tiny.random_shortcuts(checkpoint, LAYERS)
    shortcuts.save(stored)
    requests = mixed_requests(NUM_LAYERS, tiny.ENGINE_SIZES["vocab_size"], first_token=2)
    prompts, depths = [r.prompt for r in requests], [r.exit_layer for r in requests]
    heads = every_other_by_shortcut(depths)
    assert heads.count("shortcut") > 10

    with tiny_engine(checkpoint, **engine_options(shortcuts=stored)) as llm:
        tokens = generate_at(llm, prompts, depths, heads, max_tokens=NUM_TOKENS)
        plain = generate_at(llm, prompts, depths, max_tokens=NUM_TOKENS)

    by_request = mapped(shortcuts, depths, heads)
    assert mixed_mismatches(checkpoint, depths, prompts, tokens, by_request) == []
    assert mixed_mismatches(checkpoint, depths, prompts, plain) == []
    differing = [i for i, (a, b) in enumerate(zip(tokens, plain, strict=True)) if a != b]
    assert len(differing) > 0.9 * len(by_request) and set(differing) <= by_request.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {
            "kv_segments": 1,
            "num_gpu_blocks_override": 7,
            "max_model_len": 256,
            "disable_log_stats": False,
        },
        {"kv_segments": 3},
    ],
    ids=["preemption", "three-segments"],
)
def test_other_features_leave_it_the_same(llama, stored, changes):
    changes = dict(changes)
    shortcuts = tiny.random_shortcuts(llama, LAYERS)
    shortcuts.save(stored)
    options = engine_options(changes.pop("kv_segments"), stored)
    rng = random.Random(5)
    phrase = [rng.randrange(5, 500) for _ in range(6)]
    prompts = [[*phrase * 20, 5 + i] for i in range(12)]  # each grows out of its first block
    depths = [(2, 6, 3, 5)[i % 4] for i in range(12)]
    heads = every_other_by_shortcut(depths)

    with tiny_engine(llama, **{**options, **changes}) as llm:
        tokens = generate_at(llm, prompts, depths, heads, max_tokens=NUM_TOKENS)
        assert "num_gpu_blocks_override" not in changes or preemptions(llm) > 0

    by_request = mapped(shortcuts, depths, heads)
    assert mixed_mismatches(llama, depths, prompts, tokens, by_request) == []


def test_all_completions_and_a_scored_prompt_go_through_it(llama, stored):
    shortcuts = tiny.random_shortcuts(llama, LAYERS)
    shortcuts.save(stored)
    prompt = [7, 9, 11, 13]
    common = {"temperature": 0, "max_tokens": 4, "detokenize": False, "ignore_eos": True}
    exits = [exit_args(3), exit_args(3, "shortcut")]
    with tiny_engine(llama, max_logprobs=512, **engine_options(shortcuts=stored)) as llm:
        sampled = SamplingParams(**common | {"temperature": 1, "seed": 3}, n=2, extra_args=exits[1])
        [drawn] = llm.generate([{"prompt_token_ids": prompt}], sampled, use_tqdm=False)
        scoring = [SamplingParams(**common, prompt_logprobs=0, extra_args=e) for e in exits]
        plain, short = llm.generate([{"prompt_token_ids": prompt}] * 2, scoring, use_tqdm=False)

    tokens = [list(short.outputs[0].token_ids)]
    assert len(drawn.outputs) == 2
    assert mixed_mismatches(llama, [3], [prompt], tokens, {0: shortcuts.by_layer[3]}) == []
    own, other = (
        [at[token].logprob for at, token in zip(o.prompt_logprobs[1:], prompt[1:], strict=True)]
        for o in (plain, short)
    )
    assert all(abs(a - b) > 1e-3 for a, b in zip(own, other, strict=True))


def test_heads_of_a_depth_share_its_blocks(llama, stored, monkeypatch):
    """The map comes after the last layer, so keys and values are those of the plain exit."""
    shortcuts = tiny.random_shortcuts(llama, LAYERS)
    shortcuts.save(stored)
    rng = random.Random(1)
    prompt = [rng.randrange(5, 512) for _ in range(2 * BLOCK + 10)]
    events_on = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    options = engine_options(shortcuts=stored)
    with tiny_engine(llama, kv_events_config=events_on, **options) as llm:
        found = [
            stored_blocks(llm, monkeypatch, prompt, 3, head)
            for head in ("plain", "shortcut", "plain")
        ]
    assert [len(blocks) for blocks, _ in found] == [2, 0, 0]
    by_request = {1: shortcuts.by_layer[3]}
    tokens = [tokens for _, tokens in found]
    assert mixed_mismatches(llama, [3] * 3, [prompt] * 3, tokens, by_request) == []


def test_another_backbones_shortcuts_are_refused(llama, stored, tmp_path):
    other = tiny.saved(tiny.tiny_llama(NUM_LAYERS, seed=1, **tiny.ENGINE_SIZES), tmp_path / "other")
    tiny.random_shortcuts(other, LAYERS).save(stored)
    with (
        pytest.raises(BindingError, match=r"fitted for backbone .*, not for Llama"),
        tiny_engine(llama, **engine_options(shortcuts=stored)),
    ):
        pass


def test_a_missing_file_is_named(llama, stored):
    with (
        pytest.raises(TableError, match=r"shortcuts\.safetensors cannot be read"),
        tiny_engine(llama, **engine_options(shortcuts=stored)),
    ):
        pass
