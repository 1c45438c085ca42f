"""Cut a checkpoint to its first decoder layers: the reference that exit layers are held to."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def cut_checkpoint(
    source: Path, depth: int, target: Path, dtype: torch.dtype | None = None
) -> Path:
    """Write an ordinary checkpoint that holds only the first `depth` decoder layers.

    Embeddings, final norm, LM head and tokenizer are the source's own; `dtype` converts the
    floating-point tensors. Returns `target`; one that is complete already is left alone.
    Raises `ValueError` unless 1 <= depth <= the source's layer count.
    """
    if (target / "config.json").exists():
        return target
    config = json.loads((source / "config.json").read_text())
    text_config = config.get("text_config", config)
    num_layers = text_config["num_hidden_layers"]
    if not 1 <= depth <= num_layers:
        raise ValueError(f"depth is {depth}; allowed for {source}: 1..{num_layers}")
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        _kept_tensors(source, depth, dtype), target / "model.safetensors", metadata={"format": "pt"}
    )
    ignored = shutil.ignore_patterns(*_WEIGHTS, "config.json")
    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    _cut_config(text_config, depth)
    if dtype is not None:
        _set_dtype(config, dtype)
        _set_dtype(text_config, dtype)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def _kept_tensors(source: Path, depth: int, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - safe_open is not a mapping
                layer = _LAYER.search(name)
                if layer and int(layer[1]) >= depth:
                    continue
                tensor = weights.get_tensor(name)
                convert = dtype is not None and tensor.is_floating_point()
                tensors[name] = tensor.to(dtype) if convert else tensor
    if not tensors:
        raise ValueError(f"{source} has no *.safetensors weights to cut")
    return tensors


def _cut_config(text_config: dict[str, Any], depth: int) -> None:
    """Shorten the layer count and every per-layer list in place."""
    num_layers = text_config["num_hidden_layers"]
    for key, value in text_config.items():
        if key == "layer_types" or (isinstance(value, list) and len(value) == num_layers):
            text_config[key] = value[:depth]
    text_config["num_hidden_layers"] = depth


def _set_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = name
