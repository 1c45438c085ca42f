"""Checkpoints of a part of another's decoder layers: cut to its first ones, the reference that exit
layers are held to, or with any of them left out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
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

    As `checkpoint_of`. Raises CheckpointError also for a `depth` outside 1..its layers.
    """
    num_layers = text_config(read_config(source), source)["num_hidden_layers"]
    if not 1 <= depth <= num_layers:
        raise CheckpointError(f"depth is {depth}; allowed for {source}: 1..{num_layers}")
    return checkpoint_of(source, range(1, depth + 1), target, dtype)


def checkpoint_of(
    source: Path, layers: Sequence[int], target: Path, dtype: torch.dtype | None = None
) -> Path:
    """Write an ordinary checkpoint that holds only these decoder layers (from 1, ascending).

    Embeddings, final norm, LM head and tokenizer are the source's own; `dtype` converts the
    floating-point tensors. Returns `target`; an earlier checkpoint of the same layers and dtype
    that is complete already is left alone.

    Raises:
        CheckpointError: `source` is no checkpoint, it has no such layers, or its configuration
            does not tell their kinds (sliding, full) apart; `target` holds another checkpoint.
    """
    config = read_config(source)
    _keep_in_config(config, layers, source)
    if dtype is not None:
        _set_dtype(config, dtype)
    if (target / "config.json").exists():
        if read_config(target) != config:
            raise CheckpointError(
                f"{target} holds another checkpoint than {source} of layers {list(layers)}"
            )
        return target
    tensors = _kept_tensors(source, layers, dtype)
    ignored = shutil.ignore_patterns(*_WEIGHTS, "config.json")
    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    # Last, since its presence says that the rest is complete.
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return target


def _kept_tensors(
    source: Path, layers: Sequence[int], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """By name, layers numbered anew."""
    place = {str(layer - 1): position for position, layer in enumerate(layers)}
    tensors = {}
    for file in weight_files(source):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - safe_open is not a mapping
                layer, kept = _DECODER_LAYER.match(name), name
                if layer:
                    if layer[1] not in place:
                        continue
                    kept = f"{name[: layer.start(1)]}{place[layer[1]]}{name[layer.end(1) :]}"
                tensor = weights.get_tensor(name)
                convert = dtype is not None and tensor.is_floating_point()
                tensors[kept] = tensor.to(dtype) if convert else tensor
    return tensors


def _keep_in_config(config: dict[str, Any], layers: Sequence[int], source: Path) -> None:
    """Shorten the layer count and the list of layer types, in place. Raises CheckpointError."""
    text = text_config(config, source)
    num_layers, kept = text["num_hidden_layers"], list(layers)
    if not kept or kept != sorted(set(kept)) or not 1 <= kept[0] <= kept[-1] <= num_layers:
        raise CheckpointError(f"layers are {kept}; allowed for {source}: some of 1..{num_layers}")
    text["num_hidden_layers"] = len(kept)
    if text.get("layer_types"):
        text["layer_types"] = [text["layer_types"][layer - 1] for layer in kept]
    if kept[-1] == len(kept):
        return
    if text.get("sliding_window") and not text.get("layer_types"):
        raise CheckpointError(
            f"{source}: config.json gives a sliding window, but no layer_types; only its last "
            "layers can be left out"
        )
    text["kept_layers"] = kept  # or two checkpoints of as many layers would pass for the same


def _set_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    """State `dtype` in the configuration and in a nested text configuration, in place."""
    name = str(dtype).removeprefix("torch.")
    for part in (config, config.get("text_config", {})):
        for key in ({"dtype", "torch_dtype"} & part.keys()) or {"dtype"}:
            part[key] = name
