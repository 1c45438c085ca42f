"""An encoder's transformer in ONNX Runtime, in the place of the torch one.

sentence-transformers has an ONNX back end of its own, but the package that it needs (optimum-onnx)
does not go with transformers 5. Only the transformer is exchanged: tokeniser, pooling and
normalisation stay those of sentence-transformers.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from raee_serve.checkpoints import cache_dir
from raee_serve.retrieval.onnx_int8 import quantised
from raee_serve.retrieval.onnx_runtime import session

EXPORT_VERSION = 2
"""Part of the cache path. Raised whenever an export writes something else than before."""
OPSET = 17
OUTPUT = "last_hidden_state"


class OnnxTransformer(torch.nn.Module):
    """Answers as the transformer that `file` was exported from, its last hidden state only.

    Takes each text of a batch by itself: padding costs more than a batch gains on a CPU, and as
    8-bit activations are scaled for each text alone, its vector does not depend on its company.
    """

    def __init__(self, file: Path, config: Any, threads: int) -> None:
        super().__init__()
        self._session = session(str(file), threads)
        self._inputs = [node.name for node in self._session.get_inputs()]
        self.config = config

    def forward(self, **features: Any) -> dict[str, torch.Tensor]:
        feeds = {name: features[name].numpy() for name in self._inputs}
        mask = feeds["attention_mask"].astype(bool)
        hidden = np.zeros((*mask.shape, self.config.hidden_size), np.float32)
        for row, counts in enumerate(mask):
            first, last = np.flatnonzero(counts)[[0, -1]]
            own = slice(row, row + 1), slice(first, last + 1)
            hidden[own] = self._session.run([OUTPUT], {n: f[own] for n, f in feeds.items()})[0]
        return {OUTPUT: torch.from_numpy(hidden)}


def exported(transformer: torch.nn.Module, example: dict[str, Any], key: str, int8: bool) -> Path:
    """The ONNX file of a transformer, written into the user's cache when it is first asked for.

    example: features of any texts. key: identifies the weights. int8: weights in 8 bits, and
    activations as they come.
    """
    target = cache_dir() / f"encoder-{EXPORT_VERSION}" / f"{key}{'-int8' if int8 else ''}.onnx"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_file():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                file = Path(scratch) / "model.onnx"
                _export(transformer, example, file)
                if int8:
                    file = quantised(file, _tensors(example))
                file.chmod(0o644)
                file.rename(target)
    return target


class _Positional(torch.nn.Module):
    """A transformer that takes its inputs one after the other and gives one tensor."""

    def __init__(self, transformer: torch.nn.Module, inputs: Sequence[str]) -> None:
        super().__init__()
        self._transformer = transformer
        self._inputs_in_order = inputs

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        features = dict(zip(self._inputs_in_order, tensors, strict=True))
        hidden = self._transformer(**features, return_dict=True).last_hidden_state
        assert isinstance(hidden, torch.Tensor)
        return hidden


def _export(transformer: Any, example: dict[str, Any], file: Path) -> None:
    """Batch size and length stay open. Attention is traced in its plain form."""
    attention = transformer.config._attn_implementation
    tensors = _tensors(example)
    transformer.set_attn_implementation("eager")
    try:
        with warnings.catch_warnings():  # of deprecation, and of traced checks of no consequence
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Positional(transformer, tuple(tensors)).eval(),
                tuple(tensors.values()),
                str(file),
                input_names=list(tensors),
                output_names=[OUTPUT],
                dynamic_axes={name: {0: "batch", 1: "length"} for name in (*tensors, OUTPUT)},
                opset_version=OPSET,
                dynamo=False,  # the newer exporter needs another package and gives the same speed
            )
    finally:
        transformer.set_attn_implementation(attention)


def _tensors(example: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: v for name, v in example.items() if isinstance(v, torch.Tensor)}
