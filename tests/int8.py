"""A checkpoint whose layers are int8, for vanilla vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from raee_serve.checkpoints import read_config, weight_files

PROJECTION = "_proj.weight"
"""How the names of the quantized tensors end: attention and MLP, in Llama and Gemma checkpoints."""
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def int8_checkpoint(source: Path, target: Path) -> Path:
    """`target`: `source` with the layers' projections in int8, rounded to the nearest step of one
    scale for each output channel; their inputs are quantized as they come, token by token."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(source):
        for name, weight in load_file(file).items():
            if name.endswith(PROJECTION):
                largest = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-8)
                scale = (largest / 127).to(weight.dtype)
                steps = (weight.float() / scale.float()).round().clamp(-127, 127)
                tensors[name] = steps.to(torch.int8)
                tensors[f"{name}_scale"] = scale
            else:
                tensors[name] = weight
    weights = shutil.ignore_patterns("*.safetensors*", "*.bin*", "*.gguf", "config.json")
    shutil.copytree(source, target, ignore=weights)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = read_config(source) | {"quantization_config": SCHEME}
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return target
