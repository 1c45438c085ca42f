"""Probes: linear classifiers that answer a task from the state after a layer.

A probe takes the place of the LM head: scores = state @ weight.T + bias, where the state is what
the final norm gives for the last position of the prompt. Workers hold the probes of a table as one
*probe set*; a request names the set and the probe it leaves through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from raee_serve.errors import TableError


@dataclass(frozen=True, slots=True)
class Probe:
    """weight: [num_labels, hidden_size] float32; bias: [num_labels] float32."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def scores(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """[..., hidden_size] states after the final norm -> [..., num_labels]."""
        return states @ self.weight.T + self.bias


def packed(probes: Mapping[str, Probe]) -> bytes:
    """Probes by name as safetensors, the form in which they travel to the workers."""
    tensors = {}
    for name, probe in probes.items():
        tensors[f"{name}.weight"] = np.ascontiguousarray(probe.weight, np.float32)
        tensors[f"{name}.bias"] = np.ascontiguousarray(probe.bias, np.float32)
    return save(tensors)


def unpacked(data: bytes) -> dict[str, Probe]:
    """The probes that `packed` was given. Raises TableError if the bytes are something else."""
    try:
        tensors = load(data)
        names = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
        return {name: Probe(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names}
    except (SafetensorError, LookupError, ValueError) as e:
        raise TableError(f"probes cannot be read ({type(e).__name__}: {e})") from e
