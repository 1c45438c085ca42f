"""Invariant 2 on model runner V2, whose kernels Triton's interpreter runs.

Eager steps are those of CUDA. Steps from captured segments are, too, but for the capture itself:
`generate_on_v2` has the captured functions run again.
"""

import random

import pytest

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
"""Room for 12 blocks; the requests of `CROWD` need 15 in the end."""
CROWD = (60, 70, 50, 64, 40)
POINTS = {EXIT_POINTS_KEY: [2, 4, 6]}
SIZES = [1, 3, 8]
"""Of captured batches."""
WHOLE, BY_DEPTH = (engine_options(kv_segments=n)["additional_config"] for n in (1, 3))
SHORTCUT_AT = {0: 2, 2: 3}
"""Exit layers of the requests that leave through shortcuts, by their place."""


def prompts_of(seed, lens=LENS):
    rng = random.Random(seed)
    return [[rng.randrange(5, ENGINE_SIZES["vocab_size"]) for _ in range(n)] for n in lens]


def at(prompts, exit_layers, max_tokens=6, **more):
    run = {"prompts": prompts, "exit_layers": list(exit_layers), "max_tokens": max_tokens}
    return run | more


def job(checkpoint, runs, graph_sizes=(), is_compiled=False, **changes):
    return {
        "checkpoint": str(checkpoint),
        "changes": {"max_num_batched_tokens": CHUNK, **changes},
        "runs": runs,
        "graph_sizes": list(graph_sizes),
        "is_compiled": is_compiled,
    }


def all_depths(seed=1):
    prompts = prompts_of(seed)
    return [
        at(prompts, [1, 4, 2, 6, 3, 5]),
        at(prompts, [6, 4, 1, 2, 3, 1]),  # some find their prefixes cached, others must not
        at(prompts[1:4], [3, 3, 3]),
    ]


def at_points():
    """Mixed, of one depth, few, more requests than the largest size, and off the exit points."""
    prompts = prompts_of(4)
    return [
        at(prompts, [2, 6, 4, 2, 6, 2]),
        at(prompts, [4] * 6),
        at(prompts[:3], [2, 6, 2]),
        at([*prompts, *prompts_of(5)], [2, 6] * 6, max_tokens=3),
        at(prompts[1:4], [3, 6, 2], max_tokens=3),
    ]


@pytest.fixture(scope="module")
def shortcuts(llama):
    return random_shortcuts(llama, SHORTCUT_AT.values())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = tiny_llama(NUM_LAYERS, **ENGINE_SIZES)
    return saved(model, tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def answered(llama, shortcuts, tmp_path_factory):
    """(job, results) by name; one process runs them all, for importing vLLM takes the longest."""
    directory = tmp_path_factory.mktemp("more")
    windowed = tiny_gemma3(NUM_LAYERS, sliding_window=20, **ENGINE_SIZES)
    gemma = saved(windowed, directory / "gemma3")
    shortcuts.save(stored := directory / "shortcuts.safetensors")
    crowd = at(prompts_of(2, CROWD), [2, 6, 1, 5, 3], max_tokens=30)
    heads = ["shortcut", "plain", "shortcut", "plain"]
    short = at(prompts_of(6, (40, 9, 12, 7)), [2, 2, 3, 6], heads=heads)
    jobs = {
        "sync": job(llama, all_depths(), async_scheduling=False),
        "async": job(llama, all_depths()),
        "cramped": job(llama, [crowd], **CRAMPED, additional_config=WHOLE),
        "windows": job(gemma, all_depths(3)[:1]),
        "by depth": job(llama, [crowd], **CRAMPED, additional_config=BY_DEPTH),
        "points": job(llama, at_points(), SIZES, additional_config=POINTS),
        "compiled windows at points": job(
            gemma, at_points()[:1], SIZES, is_compiled=True, additional_config=POINTS
        ),
        "by depth at points": job(
            llama, at_points()[:1], SIZES, additional_config=POINTS | BY_DEPTH
        ),
        "shortcuts": job(llama, [short], SIZES, **engine_options(shortcuts=stored)),
    }
    results = generate_on_v2(list(jobs.values()))
    return dict(zip(jobs, zip(jobs.values(), results, strict=True), strict=True))


def wrong_tokens(job, results, shortcuts=None):
    """Of each run."""
    return [
        mixed_mismatches(
            job["checkpoint"], run["exit_layers"], run["prompts"], result["tokens"], shortcuts
        )
        for run, result in zip(job["runs"], results, strict=True)
    ]


@pytest.mark.parametrize("name", ["sync", "async"])
def test_depths_equal_cut_checkpoints(answered, name):
    job, results = answered[name]
    assert [result["async"] for result in results] == [name == "async"] * 3
    assert wrong_tokens(job, results) == [[]] * 3


@pytest.mark.parametrize("name", ["cramped", "windows", "by depth"])
def test_they_do_under_other_conditions(answered, name):
    assert wrong_tokens(*answered[name]) == [[]]


def test_requests_were_preempted(answered):
    _, [result] = answered["cramped"]
    assert result["preemptions"] > 0


def test_captured_segments_equal_cut_checkpoints(answered):
    job, results = answered["points"]
    assert wrong_tokens(job, results) == [[]] * 5
    assert results[0]["async"]
    mixed, uniform, few, too_many, off_points = (result["replayed"] for result in results)
    assert min(mixed, uniform, few) >= 4
    assert too_many < 3
    assert off_points == 0


@pytest.mark.parametrize("name", ["compiled windows at points", "by depth at points"])
def test_they_do_with_several_kv_cache_groups(answered, name):
    job, results = answered[name]
    assert wrong_tokens(job, results) == [[]]
    assert results[0]["replayed"] >= 4


def test_layers_share_what_is_compiled_of_them(answered):
    _, [result] = answered["compiled windows at points"]
    first_and_others, one_row_and_more = 2, 2
    assert result["compiled"] == first_and_others * one_row_and_more


def test_shortcuts_are_of_the_layer_they_leave_at(answered, shortcuts):
    job, results = answered["shortcuts"]
    through = {place: shortcuts.by_layer[layer] for place, layer in SHORTCUT_AT.items()}
    assert wrong_tokens(job, results, through) == [[]]
    assert results[0]["replayed"] == 0
