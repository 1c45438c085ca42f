"""Invariant 2 on model runner V2, whose kernels Triton's interpreter runs.

Eager steps are those of CUDA. Steps from captured segments are, too, but for the capture itself:
`generate_on_v2` has the captured functions run again.
"""

import random

import pytest

from raee_serve.engine.settings import EXIT_POINTS_KEY, engine_options, exit_args, label_of
from raee_serve.exits.probes import packed
from tests.engine.interpreted import generate_on_v2
from tests.engine.probing import has_no_answer, random_probes, requests_through, wrong_labels
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


PROBES = random_probes({"two": 2, "six": 6})


def prompts_of(seed, lens=LENS):
    rng = random.Random(seed)
    return [[rng.randrange(5, ENGINE_SIZES["vocab_size"]) for _ in range(n)] for n in lens]


def at(prompts, exit_layers, max_tokens=6, **more):
    run = {"prompts": prompts, "exit_layers": list(exit_layers), "max_tokens": max_tokens}
    return run | more


def job(checkpoint, runs, graph_sizes=(), is_compiled=False, probes=None, **changes):
    return {
        "checkpoint": str(checkpoint),
        "changes": {"max_num_batched_tokens": CHUNK, **changes},
        "runs": runs,
        "graph_sizes": list(graph_sizes),
        "is_compiled": is_compiled,
        "probes": probes,
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


BY_PROBE = requests_through(PROBES, "set", prompts_of(7), [2, 6, 1, 3, 4, 6])
OF_ONE_TOKEN = requests_through(PROBES, "set", [[7], [9], [11]], [2, 4, 6])
"""Their step is one of decodes, which captured segments replay."""
UNKNOWN = requests_through(PROBES, "nowhere", prompts_of(9, (5, 70)), [2, 6])


def through(requests, **more):
    """A run of these requests by probe."""
    prompts, extra_args = [r.prompt for r in requests], [r.extra_args for r in requests]
    return {"prompts": prompts, "extra_args": extra_args, **more}


def beside_probes(by_probe, prompts, exit_layers):
    """A run of these requests by probe, and of plain ones of some tokens between them."""
    plain = zip(prompts, map(exit_args, exit_layers), strict=True)
    pairs = zip(((r.prompt, r.extra_args) for r in by_probe), plain, strict=True)
    all_prompts, extra_args = zip(*(one for pair in pairs for one in pair), strict=True)
    return {"prompts": list(all_prompts), "extra_args": list(extra_args), "max_tokens": 6}


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
    (probes := directory / "probes").write_bytes(packed(PROBES))
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
        "probes": job(
            llama,
            [
                through(BY_PROBE, logprobs=2),
                beside_probes(BY_PROBE, prompts_of(8), [2, 6, 3, 4, 6, 2]),
                through(OF_ONE_TOKEN, logprobs=2),
                through(BY_PROBE, temperature=1.0, seed=3),
                beside_probes(BY_PROBE[:2], prompts_of(8)[:2], [2, 6]) | {"prompt_logprobs": 1},
                through(UNKNOWN, logprobs=2),
            ],
            SIZES,
            probes={"set": str(probes)},
            additional_config=POINTS,
        ),
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


def test_probes_give_the_references_probabilities(answered, llama):
    _, [alone, *_] = answered["probes"]
    assert wrong_labels(llama, BY_PROBE, PROBES, alone["outcomes"]) == []
    assert {columns for _, columns in alone["logits"]} == {64}


def test_requests_beside_probes_stay_as_they_are(answered, llama):
    job, results = answered["probes"]
    run, mixed = job["runs"][1], results[1]
    assert wrong_labels(llama, BY_PROBE, PROBES, mixed["outcomes"][::2]) == []
    tokens = [outcome["completions"][0]["token_ids"] for outcome in mixed["outcomes"][1::2]]
    assert mixed_mismatches(llama, [2, 6, 3, 4, 6, 2], run["prompts"][1::2], tokens) == []
    assert mixed["replayed"] > 0


def test_a_replayed_step_can_leave_by_probe(answered, llama):
    results = answered["probes"][1]
    assert results[2]["replayed"] == 1
    assert wrong_labels(llama, OF_ONE_TOKEN, PROBES, results[2]["outcomes"]) == []


def test_probes_are_sampled_from(answered):
    drawn = answered["probes"][1][3]["outcomes"]
    labels = [label_of(outcome["completions"][0]["token_ids"][0]) for outcome in drawn]
    for label, request in zip(labels, BY_PROBE, strict=True):
        assert 0 <= label < len(request.bias)


def test_prompts_are_scored_by_the_lm_head(answered, llama):
    scored = answered["probes"][1][4]
    assert wrong_labels(llama, BY_PROBE[:2], PROBES, scored["outcomes"][::2]) == []
    for outcome in scored["outcomes"]:
        assert all(-30 < min(at.values()) < 0 for at in outcome["prompt_logprobs"][1:])


def test_an_unknown_probe_has_no_answer(answered):
    unknown = answered["probes"][1][5]["outcomes"]
    assert all(map(has_no_answer, unknown)) and len(unknown) == 2
