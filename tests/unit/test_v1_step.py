"""Which rows a step's plan keeps: those that the runner reads after the forward."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

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
