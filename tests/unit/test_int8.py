"""The checkpoint of int8 weights that engines are compared on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.int8 import int8_checkpoint
from tests.tiny import tokenized_llama

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_near_the_whole_ones(smollm2, tmp_path, dtype):
    checkpoint = tokenized_llama(tmp_path / "tiny", smollm2)
    source = shutil.copytree(checkpoint, tmp_path / "source")
    whole = {k: t.to(dtype) for k, t in load_file(source / "model.safetensors").items()}
    save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    int8 = int8_checkpoint(source, tmp_path / "int8")
    found = load_file(int8 / "model.safetensors")
    assert (int8 / "tokenizer.json").is_file()
    for name, weight in whole.items():
        if not name.endswith("_proj.weight"):
            torch.testing.assert_close(found[name], weight)
            continue
        assert found[name].dtype is torch.int8
        scale = found[f"{name}_scale"]
        assert scale.shape == (len(weight), 1) and scale.dtype is dtype
        away = (found[name].float() * scale.float() - weight.float()).abs() / scale.float()
        # The largest weight of a channel may lie a little beyond 127 steps of the rounded scale.
        most = torch.where(found[name].abs() == 127, 0.5 + 127 * torch.finfo(dtype).eps, 0.5 + 1e-4)
        assert (away <= most).all()
    kept = json.loads((int8 / "config.json").read_text())
    assert kept["quantization_config"]["quant_method"] == "compressed-tensors"
