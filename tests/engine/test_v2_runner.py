"""Invariant 2 on model runner V2, whose kernels Triton's interpreter runs.

Eager steps are those of CUDA. Steps from captured segments are, too, but for the capture itself:
`generate_on_v2` has the captured functions run again.
"""

import random

import pytest
from vllm.utils.math_utils import cdiv

from raee_serve.engine.settings import EXIT_POINTS_KEY, engine_options
from tests.engine.interpreted import generate_on_v2
from tests.engine.reference import mixed_mismatches
from tests.tiny import ENGINE_SIZES, random_shortcuts, saved, tiny_gemma3, tiny_llama

pytestmark = pytest.mark.engine

NUM_LAYERS, BLOCK, CHUNK = 6, 32, 64
BLOCK_BYTES = NUM_LAYERS * BLOCK * 2 * 2 * ENGINE_SIZES["head_dim"] * 4
"""Keys and values of two KV heads in float32, in every layer."""
LENS = (150, 12, 5, 40, 90, 3)
"""The longest prompts take three steps of `CHUNK` tokens."""
CRAMPED = {"block_size": BLOCK, "max_model_len": 256, "kv_cache_memory_bytes": BLOCK_BYTES * 12}
POINTS = {"additional_config": {EXIT_POINTS_KEY: [2, 4, 6]}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = tiny_llama(NUM_LAYERS, **ENGINE_SIZES)
    return saved(model, tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    model = tiny_gemma3(NUM_LAYERS, sliding_window=20, **ENGINE_SIZES)
    return saved(model, tmp_path_factory.mktemp("tiny") / "gemma3")


def prompts_of(seed, lens=LENS):
    rng = random.Random(seed)
    return [[rng.randrange(5, ENGINE_SIZES["vocab_size"]) for _ in range(n)] for n in lens]


def at(prompts, exit_layers, max_tokens=6, **more):
    run = {"prompts": prompts, "exit_layers": list(exit_layers), "max_tokens": max_tokens}
    return run | more


def job(checkpoint, runs, graph_sizes=(), **changes):
    changes = {"max_num_batched_tokens": CHUNK, **changes}
    return {
        "checkpoint": str(checkpoint),
        "changes": changes,
        "runs": runs,
        "graph_sizes": list(graph_sizes),
    }


def wrong_tokens(job, results, shortcuts=None):
    """Of each run."""
    return [
        mixed_mismatches(
            job["checkpoint"], run["exit_layers"], run["prompts"], result["tokens"], shortcuts
        )
        for run, result in zip(job["runs"], results, strict=True)
    ]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_depths_equal_cut_checkpoints(llama, is_async):
    prompts = prompts_of(1)
    runs = [
        at(prompts, [1, 4, 2, 6, 3, 5]),
        at(prompts, [6, 4, 1, 2, 3, 1]),  # some find their prefixes cached, others must not
        at(prompts[1:4], [3, 3, 3]),
    ]
    asked = job(llama, runs, async_scheduling=is_async)
    [results] = generate_on_v2([asked])
    assert [result["async"] for result in results] == [is_async] * 3
    assert wrong_tokens(asked, results) == [[]] * 3


def test_preemption_windows_and_depth_growing_cache(llama, gemma):
    prompts = prompts_of(2, (60, 70, 50, 64, 40))
    mixed = at(prompts, [2, 6, 1, 5, 3], max_tokens=30)
    by_depth = engine_options(kv_segments=3)
    jobs = [
        job(llama, [mixed], **CRAMPED),
        job(gemma, [at(prompts_of(3), [1, 4, 2, 6, 3, 5])]),
        job(llama, [mixed], **CRAMPED | by_depth),
    ]
    cramped, windows, segments = generate_on_v2(jobs)
    results = (cramped, windows, segments)
    assert [wrong_tokens(*pair) for pair in zip(jobs, results, strict=True)] == [[[]]] * 3
    assert sum(cdiv(len(p) + 30, BLOCK) for p in prompts) > 12
    assert cramped[0]["preemptions"] > 0


def test_captured_segments_equal_cut_checkpoints(llama, gemma):
    """Padded, of one depth, of more requests than the largest size, and off the exit points."""
    prompts = prompts_of(4)
    runs = [
        at(prompts, [2, 6, 4, 2, 6, 2]),
        at(prompts, [4] * 6),
        at(prompts[:3], [2, 6, 2]),
        at([*prompts, *prompts_of(5)], [2, 6] * 6, max_tokens=3),
        at(prompts[1:4], [3, 6, 2], max_tokens=3),
    ]
    jobs = [
        job(llama, runs, (1, 3, 8), **POINTS),
        job(gemma, runs[:1], (1, 3, 8), **POINTS),
        job(llama, runs[:1], (1, 3, 8), additional_config=by_depth_and_points()),
    ]
    all_results = generate_on_v2(jobs)
    assert [wrong_tokens(*pair) for pair in zip(jobs, all_results, strict=True)] == [
        [[]] * len(job["runs"]) for job in jobs
    ]
    assert all(result["async"] for results in all_results for result in results)
    replayed = [[result["replayed"] for result in results] for results in all_results]
    [[mixed, uniform, few, too_many, off_points], *others] = replayed
    assert min(mixed, uniform, few) >= 4
    assert too_many < 3
    assert off_points == 0
    assert min(count for [count] in others) >= 4


def by_depth_and_points():
    return {**POINTS["additional_config"], **engine_options(kv_segments=3)["additional_config"]}


def test_shortcuts_and_drafts(llama, tmp_path):
    prompts = prompts_of(6, (40, 9, 12, 7))
    shortcuts = random_shortcuts(llama, [2, 3])
    shortcuts.save(stored := tmp_path / "shortcuts.safetensors")
    heads = ["shortcut", "plain", "shortcut", "plain"]
    jobs = [
        job(
            llama,
            [at(prompts, [2, 2, 3, 6], heads=heads)],
            (1, 3, 8),
            **engine_options(shortcuts=stored),
        ),
        job(
            llama,
            [at([[7, 8, 9] * 6, [5, 6] * 8], [3, 6], max_tokens=10)],
            speculative_config={
                "method": "ngram",
                "num_speculative_tokens": 2,
                "prompt_lookup_max": 2,
            },
        ),
    ]
    short, drafted = generate_on_v2(jobs)
    through = {i: shortcuts.by_layer[d] for i, d in ((0, 2), (2, 3))}
    assert wrong_tokens(jobs[0], short, through) == [[]]
    assert short[0]["replayed"] == 0
    assert wrong_tokens(jobs[1], drafted) == [[]]
