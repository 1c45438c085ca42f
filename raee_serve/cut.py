"""Cut a checkpoint to its first decoder layers: the reference that exit layers are held to."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from raee_serve.checkpoints import read_config, text_config, weight_files
from raee_serve.errors import CheckpointError

# The text decoder's layers as Llama and Gemma checkpoints name them, alone or inside a multimodal
# model; a vision tower's `encoder.layers.N.` is another matter and stays.
_DECODER_LAYER = re.compile(r"^(?:language_model\.)?model\.(?:language_model\.)?layers\.(\d+)\.")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf")


def cut_checkpoint(
    source: Path, depth: int, target: Path, dtype: torch.dtype | None = None
) -> Path:
    """Write an ordinary checkpoint that holds only the first `depth` decoder layers.

    Embeddings, final norm, LM head and tokenizer are the source's own; `dtype` converts the
    floating-point tensors. Returns `target`; an earlier cut of the same depth and dtype that is
    complete already is left alone.

    Raises:
        CheckpointError: `source` is no checkpoint, `depth` lies outside 1..its layers, or `target`
            holds another checkpoint.
    """
    config = read_config(source)
    num_layers = text_config(config, source)["num_hidden_layers"]
    if not 1 <= depth <= num_layers:
        raise CheckpointError(f"depth is {depth}; allowed for {source}: 1..{num_layers}")
    _cut_config(text_config(config, source), depth)
    if dtype is not None:
        _set_dtype(config, dtype)
    if (target / "config.json").exists():
        if read_config(target) != config:
            raise CheckpointError(f"{target} holds another checkpoint than {source} cut to {depth}")
        return target
    tensors = _kept_tensors(source, depth, dtype)
    ignored = shutil.ignore_patterns(*_WEIGHTS, "config.json")
    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    # Last, since its presence says that the rest is complete.
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return target


def _kept_tensors(source: Path, depth: int, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in weight_files(source):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - safe_open is not a mapping
                layer = _DECODER_LAYER.match(name)
                if layer and int(layer[1]) >= depth:
                    continue
                tensor = weights.get_tensor(name)
                convert = dtype is not None and tensor.is_floating_point()
                tensors[name] = tensor.to(dtype) if convert else tensor
    return tensors


def _cut_config(text: dict[str, Any], depth: int) -> None:
    """Shorten the layer count and the list of layer types (sliding, full), in place."""
    text["num_hidden_layers"] = depth
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][:depth]


def _set_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    """State `dtype` in the configuration and in a nested text configuration, in place."""
    name = str(dtype).removeprefix("torch.")
    for part in (config, config.get("text_config", {})):
        for key in ({"dtype", "torch_dtype"} & part.keys()) or {"dtype"}:
            part[key] = name
