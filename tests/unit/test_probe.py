"""What the probe says about a layer is what the checkpoint cut to that layer says."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raee_serve.cut import cut_checkpoint
from raee_serve.errors import CheckpointError
from raee_serve.table.probe import LayerProbe, default_dtype
from tests.tiny import tokenized_gemma3, tokenized_llama

pytestmark = pytest.mark.unit

LABELS = (500, 7, 49000)
NUM_LAYERS = 4
# Lengths differ, so that rows are padded; most are longer than Gemma's sliding window of 5.
PROMPTS = [list(range(100 + n, 100 + 4 * n, 3)) for n in (17, 3, 9, 1, 12)]


@pytest.fixture(scope="module", params=[tokenized_llama, tokenized_gemma3], ids=["llama", "gemma3"])
def checkpoint(request, tmp_path_factory, smollm2):
    return request.param(tmp_path_factory.mktemp("backbone") / "full", smollm2)


@pytest.fixture(scope="module")
def cut_models(checkpoint, tmp_path_factory):
    """depth -> transformers model of the checkpoint cut to it"""
    root = tmp_path_factory.mktemp("cut")
    return {
        depth: AutoModelForCausalLM.from_pretrained(
            cut_checkpoint(checkpoint, depth, root / str(depth)), dtype=torch.float32
        )
        for depth in range(1, NUM_LAYERS + 1)
    }


@pytest.fixture(scope="module")
def probe(checkpoint):
    return LayerProbe(checkpoint, torch.float32)


@torch.inference_mode()
def logits_of(model, tokens):
    return model(torch.tensor([tokens])).logits[0]


def test_label_logprobs_equal_the_cut_checkpoints(probe, cut_models):
    _, found = probe.label_states(PROMPTS, (NUM_LAYERS,), LABELS)
    for depth, model in cut_models.items():
        expected = [logits_of(model, p)[-1, list(LABELS)].log_softmax(0) for p in PROMPTS]
        np.testing.assert_allclose(found[:, depth - 1], torch.stack(expected), atol=1e-4)
    # The layers do disagree, or the comparison above would say nothing.
    assert np.abs(np.diff(found, axis=1)).max(axis=(0, 2)).min() > 0.1


def test_reference_scores_equal_the_cut_checkpoints(probe, cut_models):
    references = [[5, 900, 6], [7], [8, 9], [10, 11, 12, 13], [14, 15]]
    layers = (2, 3, 4)
    agreement, hits = probe.reference_scores(PROMPTS, references, layers)
    for column, depth in enumerate(layers):
        for row, (prompt, reference) in enumerate(zip(PROMPTS, references, strict=True)):
            tokens, n = [*prompt, *reference], len(reference)
            own = logits_of(cut_models[depth], tokens)[-n - 1 : -1]
            full = logits_of(cut_models[NUM_LAYERS], tokens)[-n - 1 : -1]
            same = (own.argmax(-1) == full.argmax(-1)).float().mean()
            assert agreement[row, column] == pytest.approx(float(same))
            hit = (own.argmax(-1) == torch.tensor(reference)).float().mean()
            assert hits[row, column] == pytest.approx(float(hit))
    assert (agreement[:, -1] == 1).all()
    assert (agreement[:, 0] < 1).any()


def test_states_are_what_the_head_of_the_cut_checkpoint_is_given(probe, cut_models):
    states, _ = probe.label_states(PROMPTS, (1, 3), LABELS)
    assert states.shape == (len(PROMPTS), 2, 32) and states.dtype == np.float16
    for column, depth in enumerate((1, 3)):
        model = cut_models[depth]
        with torch.inference_mode():
            decoders = [model.get_decoder()(torch.tensor([prompt])) for prompt in PROMPTS]
        expected = np.stack([own.last_hidden_state[0, -1].numpy() for own in decoders])
        np.testing.assert_allclose(states[:, column], expected, atol=2e-2, rtol=2e-3)


def test_labels_that_no_token_stands_for_have_states_all_the_same(probe):
    with_tokens, _ = probe.label_states(PROMPTS, (2,), LABELS)
    states, logprobs = probe.label_states(PROMPTS, (2,), ())
    np.testing.assert_array_equal(states, with_tokens)
    assert logprobs.shape == (len(PROMPTS), NUM_LAYERS, 0)


def test_states_beyond_half_precision_are_cut_off(probe, monkeypatch):
    monkeypatch.setattr(probe._decoder.norm, "forward", lambda hidden: hidden * 1e9)
    states, _ = probe.label_states(PROMPTS[:1], (1,), LABELS)
    assert np.isfinite(states).all() and np.abs(states).max() > 6e4


def test_states_that_are_not_numbers_stay_so(probe, monkeypatch):
    """They are refused where probes are fitted, not hidden."""
    monkeypatch.setattr(probe._decoder.norm, "forward", lambda hidden: hidden * float("nan"))
    states, _ = probe.label_states(PROMPTS[:1], (1,), LABELS)
    assert np.isnan(states).all()


def test_a_row_does_not_depend_on_its_batch(probe):
    states, logprobs = probe.label_states(PROMPTS, (2, 4), LABELS)
    alone = [probe.label_states([prompt], (2, 4), LABELS) for prompt in PROMPTS]
    np.testing.assert_allclose(logprobs, np.concatenate([own[1] for own in alone]), atol=1e-4)
    np.testing.assert_allclose(states, np.concatenate([own[0] for own in alone]), atol=2e-2)


def test_hooks_are_gone_afterwards(probe):
    probe.label_states(PROMPTS, (1,), LABELS)
    assert not any(layer._forward_hooks for layer in probe._decoder.layers)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="cannot load backbone"):
        LayerProbe(tmp_path)


def test_default_dtype_is_float32_without_native_bf16(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert default_dtype(cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert default_dtype(cpu) == torch.bfloat16
