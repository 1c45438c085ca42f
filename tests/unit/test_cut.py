"""A cut checkpoint computes what the full one computes up to that depth."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raee_serve.cut import checkpoint_of, cut_checkpoint
from raee_serve.errors import CheckpointError
from tests.tiny import saved, tiny_gemma3, tiny_llama

pytestmark = pytest.mark.unit

TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7]])


def logits_at(model, depth):
    """[1, tokens, vocabulary]: the exit head applied after the first `depth` layers."""
    states = {}
    layer = model.model.layers[depth - 1]
    handle = layer.register_forward_hook(lambda _, __, out: states.update(after=out))
    with torch.no_grad():
        model(TOKENS)
        handle.remove()
        after = states["after"][0] if isinstance(states["after"], tuple) else states["after"]
        return model.lm_head(model.model.norm(after))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gemma3])
def test_cut_model_gives_the_truncated_forward(tmp_path, make_model, depth):
    model = make_model()
    cut = cut_checkpoint(saved(model, tmp_path / "full"), depth, tmp_path / "cut")
    small = AutoModelForCausalLM.from_pretrained(cut).eval()
    assert small.config.num_hidden_layers == len(small.model.layers) == depth
    with torch.no_grad():
        torch.testing.assert_close(small(TOKENS).logits, logits_at(model, depth))


def test_tied_head_and_shards_survive(tmp_path):
    model = tiny_llama(tied=True)
    source = saved(model, tmp_path / "full", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    cut = cut_checkpoint(source, 2, tmp_path / "cut")
    assert [file.name for file in cut.glob("*.safetensors*")] == ["model.safetensors"]
    small = AutoModelForCausalLM.from_pretrained(cut).eval()
    with torch.no_grad():
        torch.testing.assert_close(small(TOKENS).logits, logits_at(model, 2))


def test_other_towers_keep_their_layers(tmp_path):
    """In a multimodal checkpoint only the text decoder loses layers."""
    source = tmp_path / "full"
    source.mkdir()
    config = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 3}}
    (source / "config.json").write_text(json.dumps(config))
    vision = {f"vision_tower.vision_model.encoder.layers.{i}.w": torch.zeros(1) for i in range(3)}
    text = {f"language_model.model.layers.{i}.w": torch.zeros(1) for i in range(3)}
    save_file(vision | text, source / "model.safetensors")
    cut = cut_checkpoint(source, 1, tmp_path / "cut")
    kept = load_file(cut / "model.safetensors")
    assert set(kept) == {*vision, "language_model.model.layers.0.w"}
    assert json.loads((cut / "config.json").read_text()) == {
        "text_config": {"num_hidden_layers": 1},
        "vision_config": {"num_hidden_layers": 3},
    }


def test_dtype_and_other_files(tmp_path):
    source = saved(tiny_llama().to(torch.bfloat16), tmp_path / "full")
    (source / "tokenizer.json").write_text("{}")
    cut = cut_checkpoint(source, 2, tmp_path / "cut", dtype=torch.float32)
    assert {tensor.dtype for tensor in load_file(cut / "model.safetensors").values()} == {
        torch.float32
    }
    assert json.loads((cut / "config.json").read_text())["dtype"] == "float32"
    assert (cut / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("depth", [0, -1, 5])
def test_depth_outside_the_model_is_refused(tmp_path, depth):
    source = saved(tiny_llama(4), tmp_path / "full")
    with pytest.raises(CheckpointError, match=rf"depth is {depth}; allowed .*1\.\.4"):
        cut_checkpoint(source, depth, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("layers", [[1, 3, 4], [2], [1, 2]])
@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gemma3])
def test_layers_are_left_out_wherever_they_are(tmp_path, make_model, layers):
    model = make_model()
    kept = checkpoint_of(saved(model, tmp_path / "full"), layers, tmp_path / "kept")
    small = AutoModelForCausalLM.from_pretrained(kept).eval()
    state = model.state_dict()
    for name, tensor in small.state_dict().items():
        number = re.search(r"layers\.(\d+)", name)
        theirs = number and name.replace(number[0], f"layers.{layers[int(number[1])] - 1}")
        torch.testing.assert_close(tensor, state[theirs or name])
    if make_model is tiny_gemma3:
        kinds = model.config.layer_types
        assert small.config.layer_types == [kinds[layer - 1] for layer in layers]


@pytest.mark.parametrize("layers", [[], [0, 1], [2, 1], [2, 2], [3, 5]])
def test_layers_that_are_not_there_are_refused(tmp_path, layers):
    source = saved(tiny_llama(4), tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"layers are .*1\.\.4"):
        checkpoint_of(source, layers, tmp_path / "kept")


def test_as_many_other_layers_are_another_checkpoint(tmp_path):
    source = saved(tiny_llama(4), tmp_path / "full")
    kept = checkpoint_of(source, [1, 3], tmp_path / "kept")
    assert checkpoint_of(source, [1, 3], kept) == kept
    with pytest.raises(CheckpointError, match="holds another checkpoint"):
        checkpoint_of(source, [1, 4], kept)


def test_kinds_of_layers_that_nobody_tells_apart_are_refused(tmp_path):
    source = saved(tiny_gemma3(4), tmp_path / "full")
    config = json.loads((source / "config.json").read_text())
    del config["layer_types"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="only its last layers"):
        checkpoint_of(source, [2, 3], tmp_path / "kept")
    checkpoint_of(source, [1, 2], tmp_path / "cut")


def test_same_cut_is_kept_and_another_refused(tmp_path):
    source = saved(tiny_llama(4), tmp_path / "full")
    cut = cut_checkpoint(source, 2, tmp_path / "cut")
    written = (cut / "model.safetensors").stat().st_mtime_ns
    cut_checkpoint(source, 2, cut)
    assert (cut / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(CheckpointError, match="holds another checkpoint"):
        cut_checkpoint(source, 3, cut)
