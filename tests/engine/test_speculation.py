"""Draft tokens from n-grams are checked at the request's own depth."""

import random

import pytest

from raee_serve.engine.settings import engine_options, exit_args
from raee_serve.exits.probes import packed
from tests.engine.engines import generate_at, generate_with, running_engine
from tests.engine.probing import random_probes, requests_through, wrong_labels
from tests.engine.reference import mixed_mismatches
from tests.tiny import ENGINE_SIZES, random_shortcuts, saved, tiny_llama

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_REQUESTS, NUM_TOKENS = 6, 24, 40
PROBES = random_probes({"two": 2, "six": 6})
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


def test_accepted_and_rejected_drafts_leave_the_cut_checkpoints_tokens(tmp_path):
    checkpoint = saved(tiny_llama(NUM_LAYERS, **ENGINE_SIZES), tmp_path / "llama")
    rng = random.Random(2)
    phrases = [[rng.randrange(5, 60) for _ in range(6)] for _ in range(NUM_REQUESTS)]
    prompts = [phrase * rng.choice([2, 5, 50]) for phrase in phrases]
    depths = [1 + i % NUM_LAYERS for i in range(NUM_REQUESTS)]
    shortcuts = random_shortcuts(checkpoint, (2, 5))
    shortcuts.save(tmp_path / "shortcuts.safetensors")
    by_request = {i: shortcuts.by_layer[depths[i]] for i in (1, 4, 13, 16)}
    heads = ["shortcut" if i in by_request else "plain" for i in range(NUM_REQUESTS)]

    by_probe = requests_through(PROBES, "set", prompts[1::2], depths[1::2])
    beside_probes = [exit_args(depth) for depth in depths]
    beside_probes[1::2] = [request.extra_args for request in by_probe]

    # In processes of its own: numba, once loaded, keeps vLLM from starting another engine.
    args = {"speculative_config": NGRAM, "disable_log_stats": False, "skip_tokenizer_init": True}
    options = engine_options(shortcuts=tmp_path / "shortcuts.safetensors")
    with running_engine(checkpoint, **args, **options) as llm:
        tokens = generate_at(llm, prompts, depths, heads, max_tokens=NUM_TOKENS)
        llm.collective_rpc("load_probes", args=("set", packed(PROBES)))
        mixed = generate_with(llm, prompts, beside_probes, max_tokens=NUM_TOKENS)
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}

    drafted = counts["vllm:spec_decode_num_draft_tokens"]
    accepted = counts["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < drafted
    assert mixed_mismatches(checkpoint, depths, prompts, tokens, by_request) == []
    assert wrong_labels(checkpoint, by_probe, PROBES, mixed[1::2]) == []
    plain = [o["completions"][0]["token_ids"] for o in mixed[::2]]
    assert mixed_mismatches(checkpoint, depths[::2], prompts[::2], plain) == []
