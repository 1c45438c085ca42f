"""Which rows a step's plan keeps, and which of them the logits are of."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams

from raee_serve.engine.probe_head import AskedProbe, ProbeRows
from raee_serve.engine.settings import exit_args, probe_args
from raee_serve_patches import v1_step

pytestmark = pytest.mark.unit


def planned(monkeypatch, drafts=(), scored=(), lora=None):
    """The plan of one request with four rows in the step, at exit layer 3 of 6."""
    monkeypatch.setattr(v1_step, "narrow_attention", lambda groups, plan, width: None)
    monkeypatch.setattr(v1_step, "fill_slots", lambda width: None)
    monkeypatch.setattr(v1_step.LoraRows, "reorder", lambda self, order: None)
    runner = SimpleNamespace(
        lora_config=lora,
        input_batch=SimpleNamespace(req_ids=["a"]),
        num_prompt_logprobs=dict.fromkeys(scored, 1),
        attn_groups=[],
        device=torch.device("cpu"),
    )
    output = SimpleNamespace(
        exit_layers={"a": 3},
        shortcuts=frozenset(),
        num_scheduled_tokens={"a": 4},
        scheduled_spec_decode_tokens={"a": list(drafts)} if drafts else {},
    )
    step = v1_step.V1Step(runner, num_layers=6)
    with step.running(output):
        return step.enter_forward()


def test_a_prompt_keeps_its_sampled_row(monkeypatch):
    assert planned(monkeypatch).stages[-1].kept_rows.tolist() == [3]


def test_drafts_keep_their_rows_too(monkeypatch):
    assert planned(monkeypatch, drafts=[7, 8]).stages[-1].kept_rows.tolist() == [1, 2, 3]


def test_a_scored_prompt_keeps_all_rows(monkeypatch):
    assert planned(monkeypatch, scored=["a"]).is_plain


def test_adapters_keep_all_rows(monkeypatch):
    assert planned(monkeypatch, lora="on").is_plain


VOCAB = 1000
PROBE = AskedProbe(("set", "name"), (0.0, 1.0))
BY_PROBE = probe_args(3, "set", "name", PROBE.bias)


@pytest.fixture
def step():
    """With requests of both heads, some with a prompt and some with drafts of 2 and 1 tokens."""
    model = SimpleNamespace(get_vocab_size=lambda: VOCAB, logits_processors=None)
    asked = {"plain": exit_args(3), "probe": BY_PROBE, "full": None, "other probe": BY_PROBE}
    limits = {name: {"allowed_token_ids": [7, 9]} for name in ("plain", "full")}
    params = {n: SamplingParams(extra_args=args, **limits.get(n, {})) for n, args in asked.items()}
    batch = SimpleNamespace(
        req_ids=list(asked),
        has_allowed_token_ids=set(limits),
        num_logprobs={"probe": 2},
        logprob_token_ids={},
    )
    runner = SimpleNamespace(
        lora_config=None,
        speculative_config=None,
        vllm_config=SimpleNamespace(model_config=model),
        input_batch=batch,
        requests={name: SimpleNamespace(sampling_params=p) for name, p in params.items()},
        num_prompt_logprobs={},
        device=torch.device("cpu"),
    )
    return v1_step.V1Step(runner, num_layers=6)


def running(step, drafts):
    output = SimpleNamespace(exit_layers={"plain": 3}, scheduled_spec_decode_tokens=drafts)
    return step.running(output)


def test_rows_follow_the_batch_and_its_drafts(step):
    step._runner.requests["probe"].sampling_params.logprobs = 2
    with running(step, {"plain": [4, 4], "full": [4]}):
        rows = step.probe_rows()
    assert rows == ProbeRows([None, None, None, PROBE, None, None, PROBE], columns=2)
    assert step.probe_rows() is None, "what is asked after the step is no part of it"


def test_a_step_without_probes_has_no_such_rows(step):
    step._runner.input_batch.req_ids = ["plain", "full"]
    with running(step, {}):
        assert step.probe_rows() is None


def test_adapters_have_the_head_take_all_rows(step, monkeypatch):
    monkeypatch.setattr(step, "_lora", SimpleNamespace(restore=lambda: None))
    with running(step, {}):
        assert step.probe_rows().head_takes_all


@pytest.mark.parametrize(
    ("logprobs", "scored", "allowed"),
    [({"probe": 2}, {}, (7, 9)), ({"plain": 2}, {}, None), ({}, {"full": 1}, None)],
    ids=["of a probe", "of others", "of a prompt"],
)
def test_requests_by_probe_do_not_widen_the_head(step, logprobs, scored, allowed):
    step._runner.input_batch.num_logprobs = logprobs
    step._runner.num_prompt_logprobs = scored
    with running(step, {}):
        assert step.allowed_tokens(2) == allowed
        assert step.allowed_tokens(1) is None
