"""Exits through probes say what Transformers says: the cut checkpoint's state times the probe."""

import random

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from raee_serve.engine.scheduler import TruncatingScheduler
from raee_serve.engine.settings import (
    EXIT_LAYER_KEY,
    NO_LABEL,
    PROBE_BIAS_KEY,
    PROBE_KEY,
    engine_options,
    exit_args,
    label_of,
    probe_args,
)
from raee_serve.errors import TableError
from raee_serve.exits.probes import Probe, packed
from tests import tiny
from tests.engine.engines import (
    generate_with,
    outcome,
    sampling_params,
    tiny_engine,
    worker_of,
)
from tests.engine.probing import (
    ProbeRequest,
    has_no_answer,
    random_probes,
    requests_through,
    wrong_labels,
)
from tests.engine.reference import mixed_mismatches
from tests.engine.test_streamed_input import as_chunk
from tests.engine.workload import mixed_requests

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_TOKENS, SHORTCUT_LAYERS = 6, 6, (2, 3, 5)
VOCAB = tiny.ENGINE_SIZES["vocab_size"]
LABELS = {"two": 2, "six": 6, "many": 150}
PROBES = random_probes(LABELS)
MODELS = {
    "llama": (tiny.tiny_llama, {}),
    "gemma3": (tiny.tiny_gemma3, {"sliding_window": 64, "final_logit_softcapping": 4.0}),
}
SAMPLED = {"temperature": 1.0, "seed": 7, "n": 4}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    make, config = MODELS[request.param]
    model = tiny.with_random_norms(make(NUM_LAYERS, **tiny.ENGINE_SIZES, **config))
    return tiny.saved(model, tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture(scope="module")
def shortcuts(checkpoint):
    return tiny.random_shortcuts(checkpoint, SHORTCUT_LAYERS)


@pytest.fixture(scope="module")
def llm(checkpoint, shortcuts, tmp_path_factory):
    shortcuts.save(stored := tmp_path_factory.mktemp("shortcuts") / "shortcuts.safetensors")
    options = engine_options(shortcuts=stored)
    with tiny_engine(checkpoint, max_logprobs=VOCAB, **options) as llm:
        load(llm, "first", PROBES)
        yield llm


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = tiny.with_random_norms(tiny.tiny_llama(NUM_LAYERS, **tiny.ENGINE_SIZES))
    return tiny.saved(model, tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def head_rows(llm):
    """How many rows each multiplication with the LM head has, and how many columns come out."""
    seen = []
    model = worker_of(llm).model_runner.get_model()
    hook = model.logits_processor.register_forward_hook(
        lambda _, args, logits: seen.append(tuple(logits.shape))
    )
    yield seen
    hook.remove()


def asking(request, **sampling):
    """Parameters of a request by probe, as the front end makes them."""
    common = {"max_tokens": 1, "temperature": 0, "logprobs": 2, "detokenize": False}
    return SamplingParams(**common | sampling, extra_args=request.extra_args)


def alternating(first, second):
    return [one for pair in zip(first, second, strict=True) for one in pair]


def load(llm, set_id, probes):
    llm.collective_rpc("load_probes", args=(set_id, packed(probes)))


def prompts_of(seed, lens):
    rng = random.Random(seed)
    return [[rng.randrange(5, VOCAB) for _ in range(n)] for n in lens]


def mixed_prompts():
    """Prompts, some of several chunks, and a depth for each; shallow and deep ones alternate."""
    requests = mixed_requests(NUM_LAYERS, VOCAB, first_token=2)
    return [r.prompt for r in requests], [r.exit_layer for r in requests]


def sampled_width(llm, monkeypatch):
    """The shapes of the logits that the sampler gets from now on."""
    runner, shapes = worker_of(llm).model_runner, []
    sample = runner._sample
    monkeypatch.setattr(
        runner,
        "_sample",
        lambda logits, *more: shapes.append(tuple(logits.shape)) or sample(logits, *more),
    )
    return shapes


def test_probabilities_equal_the_reference(llm, checkpoint, head_rows):
    """At every layer, the last one too, with prompts in one chunk and in several."""
    requests = requests_through(PROBES, "first", *mixed_prompts())
    assert {r.exit_layer for r in requests} == set(range(1, NUM_LAYERS + 1))
    args = [r.extra_args for r in requests]
    outcomes = generate_with(llm, [r.prompt for r in requests], args, logprobs=2)
    assert wrong_labels(checkpoint, requests, PROBES, outcomes) == []
    assert head_rows == []
    answers = [o["completions"][0]["token_ids"][0] for o in outcomes]
    assert len(set(answers)) > 10 and NO_LABEL not in answers


def test_all_labels_have_their_probability(llm, checkpoint):
    [request] = requests_through({"many": PROBES["many"]}, "first", [[5, 6, 7]], [3])
    asked = [request.prompt], [request.extra_args]
    [outcome] = generate_with(llm, *asked, logprobs=LABELS["many"])
    [logprobs] = outcome["completions"][0]["logprobs"]
    assert sorted(logprobs, key=int) == [str(1 + label) for label in range(LABELS["many"])]
    assert np.logaddexp.reduce(list(logprobs.values())) == pytest.approx(0, abs=1e-4)
    assert wrong_labels(checkpoint, [request], PROBES, [outcome]) == []


def test_a_mixed_batch_leaves_the_others_as_they_are(llm, checkpoint, shortcuts, head_rows):
    """Plain, shortcut and full-depth requests say the same with and without probes beside them."""
    prompts, depths = mixed_prompts()
    by_probe = requests_through(PROBES, "first", prompts[::2], depths[::2])
    others = [exit_args(d, "shortcut" if d in (2, 5) else "plain") for d in depths[1::2]]
    for exit in (exit_args(2, "shortcut"), exit_args(4), exit_args(NUM_LAYERS)):
        assert exit in others
    alone = generate_with(llm, prompts[1::2], others, max_tokens=NUM_TOKENS)
    head_rows.clear()
    args = alternating([r.extra_args for r in by_probe], others)
    outcomes = generate_with(llm, prompts, args, max_tokens=NUM_TOKENS)
    assert wrong_labels(checkpoint, by_probe, PROBES, outcomes[::2]) == []
    assert outcomes[1::2] == alone
    tokens = [o["completions"][0]["token_ids"] for o in alone]
    through = {i: shortcuts.by_layer[d] for i, d in enumerate(depths[1::2]) if d in (2, 5)}
    assert mixed_mismatches(checkpoint, depths[1::2], prompts[1::2], tokens, through) == []
    assert max(rows for rows, _ in head_rows) <= len(others)


def test_beside_limited_requests_the_head_stays_narrow(llm, checkpoint, head_rows):
    allowed = [7, 90, 300]
    prompts = prompts_of(3, [4, 9, 5, 7])
    limited = {"temperature": 0.0, "max_tokens": 1, "detokenize": False}
    limited["allowed_token_ids"] = allowed
    by_probe = requests_through(PROBES, "first", prompts[:2], [2, 6])
    params = [asking(r) for r in by_probe]
    params += [sampling_params(limited, exit_layer=d) for d in (2, 6)]
    inputs = [{"prompt_token_ids": p} for p in prompts]
    alone = [outcome(o) for o in llm.generate(inputs[2:], params[2:], use_tqdm=False)]
    head_rows.clear()
    outcomes = [outcome(o) for o in llm.generate(inputs, params, use_tqdm=False)]
    assert head_rows == [(2, len(allowed))]
    assert wrong_labels(checkpoint, by_probe, PROBES, outcomes[:2]) == []
    assert outcomes[2:] == alone


def test_seeded_draws_do_not_depend_on_the_batch(llm, head_rows):
    """Nor on how wide its logits are; each of the n completions is a draw of its own."""
    prompts = prompts_of(4, [20] * 12)
    args = [r.extra_args for r in requests_through(PROBES, "first", prompts, [3] * 12)]
    draws = [
        [c["token_ids"] for o in outcomes for c in o["completions"]]
        for outcomes in (
            generate_with(llm, prompts, args, **SAMPLED),
            generate_with(llm, [*prompts, [5, 6]], [*args, exit_args(2)], **SAMPLED)[:-1],
            generate_with(llm, prompts, args, **SAMPLED, top_k=VOCAB - 1),
        )
    ]
    assert draws[0] == draws[1] == draws[2]
    assert len(draws[0]) == 4 * 12
    labels = [label_of(token) for [token] in draws[0]]
    assert all(label < LABELS[list(LABELS)[i // 4 % 3]] for i, label in enumerate(labels))
    assert any(len(set(labels[i : i + 4])) > 1 for i in range(0, 48, 4))


@pytest.mark.parametrize(
    ("sampling", "is_narrow"),
    [
        ({}, True),
        ({"temperature": 1e-3}, True),
        ({"temperature": 1.0, "seed": 3, "top_p": 1e-6}, True),
        ({"temperature": 1.0, "min_p": 1.0}, True),
        ({"logprobs": 2}, True),
        ({"temperature": 1.0, "top_k": 1}, False),
        ({"temperature": 1e-3, "seed": 3, "top_k": 400, "top_p": 0.9}, False),
        ({"logprobs": -1}, False),
        ({"presence_penalty": 1e-6}, False),
        ({"repetition_penalty": 1.0 + 1e-6}, False),
        ({"logit_bias": {400: 0.0}}, False),
        ({"bad_words": []}, True),
    ],
    ids=str,
)
def test_the_sampler_gets_few_columns_where_it_can(
    llm, checkpoint, monkeypatch, sampling, is_narrow
):
    shapes = sampled_width(llm, monkeypatch)
    requests = requests_through(PROBES, "first", prompts_of(5, [8, 3, 30]), [1, 4, NUM_LAYERS])
    outcomes = generate_with(
        llm, [r.prompt for r in requests], [r.extra_args for r in requests], **sampling
    )
    # 151 columns, filled up to a multiple of 64.
    assert shapes == [(3, 192 if is_narrow else VOCAB)]
    assert wrong_labels(checkpoint, requests, PROBES, outcomes) == []


def test_a_bias_excludes_labels(llm):
    prompts = prompts_of(6, [9] * 20)
    bias = [-1e9] * LABELS["six"]
    bias[3] = bias[4] = 0.0
    outcomes = generate_with(llm, prompts, [probe_args(2, "first", "six", bias)] * 20, logprobs=6)
    found = {label_of(o["completions"][0]["token_ids"][0]) for o in outcomes}
    assert found == {3, 4}
    for o in outcomes:
        [logprobs] = o["completions"][0]["logprobs"]
        assert np.logaddexp(logprobs["4"], logprobs["5"]) == pytest.approx(0, abs=1e-5)


def test_prompts_are_scored_by_the_lm_head(llm, checkpoint):
    """Of a request by probe and of one beside it."""
    prompts = prompts_of(7, [20, 300])
    [request] = requests_through(PROBES, "first", prompts[:1], [3])
    for second in (exit_args(4), exit_args(3)):
        scored = generate_with(
            llm, prompts, [exit_args(3), second], prompt_logprobs=1, max_tokens=1
        )
        found = generate_with(
            llm, prompts, [request.extra_args, second], prompt_logprobs=1, max_tokens=1
        )
        for own, other in zip(found, scored, strict=True):
            assert own["prompt_logprobs"][1:] == [
                pytest.approx(at, abs=1e-4) for at in other["prompt_logprobs"][1:]
            ]
        assert found[1]["completions"] == scored[1]["completions"]
        assert wrong_labels(checkpoint, [request], PROBES, found[:1]) == []


@pytest.mark.parametrize(
    "changes",
    [
        {PROBE_KEY: ["nowhere", "six"]},
        {PROBE_KEY: ["first", "seven"]},
        {PROBE_KEY: "six"},
        {PROBE_KEY: [1, 2]},
        {PROBE_KEY: None},
        {PROBE_BIAS_KEY: [0.0] * 5},
        {PROBE_BIAS_KEY: []},
        {PROBE_BIAS_KEY: None},
        {PROBE_BIAS_KEY: ["0"] * 6},
        {PROBE_BIAS_KEY: [float("nan")] * 6},
        {PROBE_BIAS_KEY: [float("-inf")] * 6},
        {EXIT_LAYER_KEY: NUM_LAYERS + 1},
    ],
    ids=str,
)
def test_who_cannot_be_answered_says_so_and_harms_nobody(llm, checkpoint, changes):
    prompts = prompts_of(8, [12, 12, 30])
    good = requests_through({"six": PROBES["six"]}, "first", prompts[:1], [2])
    bad = good[0].extra_args | changes
    [alone] = generate_with(llm, prompts[1:2], [bad], logprobs=2)
    outcomes = generate_with(llm, prompts, [good[0].extra_args, bad, exit_args(3)], max_tokens=2)
    assert has_no_answer(alone) and has_no_answer(outcomes[1])
    assert wrong_labels(checkpoint, good, PROBES, outcomes[:1]) == []
    assert outcomes[2:] == generate_with(llm, prompts[2:], [exit_args(3)], max_tokens=2)


def broken(**changes):
    return packed(
        {"six": Probe(**{"weight": PROBES["six"].weight, "bias": PROBES["six"].bias} | changes)}
    )


@pytest.mark.parametrize(
    "data",
    [
        b"no probes",
        b"",
        broken(weight=np.zeros((6, 64), np.float32)),
        broken(bias=np.zeros(5, np.float32)),
        broken(weight=np.full((6, 128), np.nan, np.float32)),
        broken(weight=np.zeros((VOCAB, 128), np.float32), bias=np.zeros(VOCAB, np.float32)),
        packed(
            {"six": PROBES["six"], "other": random_probes({"other": 3}, hidden_size=32)["other"]}
        ),
    ],
    ids=["text", "nothing", "narrow", "uneven", "nan", "too many", "one of two"],
)
def test_a_set_that_cannot_be_loaded_changes_nothing(llm, checkpoint, data):
    with pytest.raises(TableError, match="probe"):
        llm.collective_rpc("load_probes", args=("first", data))
    requests = requests_through(PROBES, "first", prompts_of(9, [10]), [4])
    outcomes = generate_with(llm, [requests[0].prompt], [requests[0].extra_args])
    assert wrong_labels(checkpoint, requests, PROBES, outcomes) == []


def test_sets_come_and_go_under_requests_of_both(llm, checkpoint):
    """The first set's requests are answered by it to the last, and then it is no longer there."""
    other = random_probes(LABELS, seed=1)
    prompts = prompts_of(
        10, [250, 900, 700, 40] * 3
    )  # most of them are under way for several steps
    engine, found = llm.llm_engine, {}
    olds = requests_through(PROBES, "old", prompts, [1 + i % NUM_LAYERS for i in range(12)])
    news = requests_through(other, "new", prompts, [1 + i % NUM_LAYERS for i in range(12)])

    def add(requests):
        for i, r in enumerate(requests):
            params = asking(r, output_kind=RequestOutputKind.FINAL_ONLY)
            engine.add_request(f"{r.set_id} {i}", {"prompt_token_ids": r.prompt}, params)

    def step():
        for o in engine.step():
            found[o.request_id.split("-")[0]] = outcome(o)

    load(llm, "old", PROBES)
    add(olds)
    step()
    load(llm, "new", other)
    add(news)
    while sum(name.startswith("old") for name in found) < 12:
        step()
    assert len(found) < 24
    llm.collective_rpc("unload_probes", args=("old",))
    while engine.has_unfinished_requests():
        step()
    for requests, probes in ((olds, PROBES), (news, other)):
        outcomes = [found[f"{r.set_id} {i}"] for i, r in enumerate(requests)]
        assert wrong_labels(checkpoint, requests, probes, outcomes) == []
    [late] = generate_with(llm, prompts[:1], [olds[0].extra_args])
    assert has_no_answer(late)
    llm.collective_rpc("unload_probes", args=("new",))
    llm.collective_rpc("unload_probes", args=("never there",))


def test_a_prefix_found_in_the_cache_gives_the_same(llm, checkpoint):
    """Plain requests of the depth, too, leave blocks for those by probe."""
    [prompt] = prompts_of(11, [300])
    prompts = [prompt, prompt[:257], [*prompt[:256], 9, 8]]
    generate_with(llm, [prompt], [exit_args(3)], max_tokens=1)
    for _ in range(2):
        requests = requests_through(PROBES, "first", prompts, [3] * 3)
        params = [asking(r) for r in requests]
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert all(o.num_cached_tokens >= 128 for o in outputs)
        assert wrong_labels(checkpoint, requests, PROBES, [outcome(o) for o in outputs]) == []


def test_a_state_that_is_no_number_has_no_answer(llm, checkpoint):
    def spoiled(norm, args, output):
        output[0][0] = torch.nan  # of the deepest request, which stands first

    requests = requests_through(PROBES, "first", prompts_of(12, [5, 5]), [2, 4])
    args = [r.extra_args for r in requests]
    hook = worker_of(llm).model_runner.get_model().model.norm.register_forward_hook(spoiled)
    with hook:
        outcomes = generate_with(llm, [r.prompt for r in requests], args)
    assert [has_no_answer(o) for o in outcomes] == [False, True]
    assert wrong_labels(checkpoint, requests[:1], PROBES, outcomes[:1]) == []


SMALL_STEPS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
CROWDED = {**SMALL_STEPS, "num_gpu_blocks_override": 7, "max_model_len": 256}


@pytest.mark.parametrize(
    ("kv_segments", "changes"),
    [(1, CROWDED), (3, {}), (3, SMALL_STEPS)],
    ids=["preemption", "three-segments", "small-steps"],
)
def test_other_features_leave_it_the_same(llama, monkeypatch, kv_segments, changes):
    """A prompt by probe takes several steps, and can be preempted between them."""
    prompts = prompts_of(13, [250, 120, 240, 125] * 6)
    depths = [(2, 6, 3, 5, 1)[i % 5] for i in range(24)]
    by_probe = requests_through(PROBES, "first", prompts[::2], depths[::2])
    args = alternating([r.extra_args for r in by_probe], map(exit_args, depths[1::2]))
    preempted = preempted_heads(monkeypatch)
    with tiny_engine(llama, **{**engine_options(kv_segments), **changes}) as llm:
        load(llm, "first", PROBES)
        outcomes = generate_with(llm, prompts, args, max_tokens=3 * NUM_TOKENS)
    assert changes is not CROWDED or "probe" in preempted
    assert wrong_labels(llama, by_probe, PROBES, outcomes[::2]) == []
    tokens = [o["completions"][0]["token_ids"] for o in outcomes[1::2]]
    assert mixed_mismatches(llama, depths[1::2], prompts[1::2], tokens) == []


def preempted_heads(monkeypatch):
    """The exit heads of the requests that are preempted from now on."""
    heads = set()
    preempt = TruncatingScheduler._preempt_request

    def noted(scheduler, request, *args, **kwargs):
        heads.add(scheduler.exits.of(request)[1])
        preempt(scheduler, request, *args, **kwargs)

    monkeypatch.setattr(TruncatingScheduler, "_preempt_request", noted)
    return heads


def test_all_chunks_of_a_streamed_input_go_through_the_probe_of_the_first(llm, checkpoint):
    chunks = prompts_of(14, [150, 40, 130])
    [first] = requests_through({"six": PROBES["six"]}, "first", chunks[:1], [3])
    core, found, before = llm.llm_engine.engine_core, [], []
    for chunk, args in zip(chunks, [first.extra_args, exit_args(5), None], strict=True):
        core.add_request(as_chunk(llm.llm_engine, chunk, args, max_tokens=1))
        tokens = []
        while not tokens:
            tokens += [t for o in core.get_output().outputs for t in o.new_token_ids]
        before = [*before, *chunk]
        request = ProbeRequest(before, 3, "first", "six", first.bias)
        completion = {"token_ids": tokens, "logprobs": None}
        found += wrong_labels(checkpoint, [request], PROBES, [{"completions": [completion]}])
    core.abort_requests(["session"])
    assert found == []
