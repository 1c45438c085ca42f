"""A fingerprint changes with the weights and with nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from raee_serve.errors import CheckpointError
from raee_serve.fingerprint import BackboneIdentity, fingerprint_weights, identify_backbone
from tests.tiny import saved, tiny_gemma3, tiny_llama

pytestmark = pytest.mark.unit


@pytest.fixture
def llama(tmp_path):
    return saved(tiny_llama(), tmp_path / "llama")


def change(checkpoint, name, edit):
    """Rewrite one tensor of a single-file checkpoint."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = edit(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def test_identity_names_architecture_and_layers(llama, tmp_path):
    identity = identify_backbone(llama)
    assert identity == BackboneIdentity("LlamaForCausalLM", 4, fingerprint_weights(llama))
    assert str(identity).startswith("LlamaForCausalLM (4 layers, weights ")
    gemma = identify_backbone(saved(tiny_gemma3(3), tmp_path / "gemma"))
    assert (gemma.architecture, gemma.num_layers) == ("Gemma3ForCausalLM", 3)
    assert gemma.weights != identity.weights


def test_text_model_of_a_multimodal_checkpoint(llama):
    config = json.loads((llama / "config.json").read_text())
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    (llama / "config.json").write_text(json.dumps(nested))
    identity = identify_backbone(str(llama))
    assert (identity.architecture, identity.num_layers) == ("Gemma3ForConditionalGeneration", 4)


def test_independent_of_shards_and_place(llama, tmp_path):
    sharded = saved(tiny_llama(), tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert fingerprint_weights(sharded) == fingerprint_weights(llama)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t + 1e-3,
        lambda t: t.to(torch.bfloat16),
        lambda t: t.T.contiguous(),
    ],
    ids=["values", "dtype", "shape"],
)
def test_changes_with_any_tensor(llama, edit):
    before = fingerprint_weights(llama)
    change(llama, "model.layers.3.mlp.up_proj.weight", edit)
    assert fingerprint_weights(llama) != before


def test_large_tensors_are_sampled_at_both_ends_and_in_the_middle(tmp_path):
    prints = set()
    for changed in (None, 0, 50_000, 99_999):
        tensor = torch.zeros(100_000)
        if changed is not None:
            tensor[changed] = 1
        save_file({"w": tensor}, tmp_path / "model.safetensors")
        prints.add(fingerprint_weights(tmp_path))
    assert len(prints) == 4


def test_swapped_tensors_differ(tmp_path):
    a, b = torch.zeros(8), torch.ones(8)
    save_file({"a": a, "b": b}, tmp_path / "model.safetensors")
    before = fingerprint_weights(tmp_path)
    save_file({"a": b, "b": a}, tmp_path / "model.safetensors")
    assert fingerprint_weights(tmp_path) != before


def test_damaged_or_missing_weights_are_refused(llama):
    file = llama / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-100], b"\x04" + bytes(7) + b"nope" + bytes(50)):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            identify_backbone(llama)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors files"):
        identify_backbone(llama)


def test_missing_shard_is_refused(tmp_path):
    sharded = saved(tiny_llama(), tmp_path, max_shard_size="20KB")
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"missing {shard.name}"):
        fingerprint_weights(sharded)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": ["a"]}'])
def test_broken_index_is_refused(llama, index):
    (llama / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="no index of weight files"):
        fingerprint_weights(llama)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no checkpoint at"),
        ("not json", "no checkpoint at"),
        ("[]", "must hold an object"),
        ('{"architectures": ["GPT2LMHeadModel"], "n_layer": 12}', "num_hidden_layers None"),
        ('{"num_hidden_layers": 4}', "names no architecture"),
    ],
)
def test_unreadable_config_is_refused(llama, config, message):
    (llama / "config.json").unlink()
    if config is not None:
        (llama / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        identify_backbone(llama)
