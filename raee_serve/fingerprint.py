"""Who a backbone is: what a table is bound to, so that it is never used with another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from raee_serve.checkpoints import read_config, text_config, weight_files
from raee_serve.errors import CheckpointError

_BLOCK = 4096
"""Bytes read at the start, middle and end of every tensor."""


@dataclass(frozen=True, slots=True)
class BackboneIdentity:
    """architecture: as vLLM names it; num_layers: decoder layers; weights: see below."""

    architecture: str
    num_layers: int
    weights: str

    def __str__(self) -> str:
        return f"{self.architecture} ({self.num_layers} layers, weights {self.weights[:12]})"


def identify_backbone(path: str | Path) -> BackboneIdentity:
    """Identity of the checkpoint in directory `path`.

    Raises:
        CheckpointError: `path` is no readable checkpoint with safetensors weights.
    """
    path = Path(path)
    config = read_config(path)
    architectures = config.get("architectures")
    if not architectures:
        raise CheckpointError(f"{path / 'config.json'} names no architecture")
    return BackboneIdentity(
        architecture=architectures[0],
        num_layers=text_config(config, path)["num_hidden_layers"],
        weights=fingerprint_weights(path),
    )


def fingerprint_weights(path: str | Path) -> str:
    """SHA-256 (64 hex) over every tensor's name, dtype, shape and a sample of its bytes.

    Independent of how the tensors are spread over files, and a matter of milliseconds for
    gigabytes. A change confined to bytes outside the samples goes unseen; training, merging or
    converting a model changes every tensor it touches throughout.

    Raises:
        CheckpointError: no safetensors weights, or a damaged file.
    """
    path = Path(path)
    entries: list[tuple[str, str, bytes]] = []
    for file in weight_files(path):
        folder = file.parent.relative_to(path).as_posix()
        entries += [(folder, name, digest) for name, digest in _tensor_digests(file)]
    total = hashlib.sha256()
    for folder, name, digest in sorted(entries):
        total.update(json.dumps([folder, name]).encode() + digest)
    return total.hexdigest()


def _tensor_digests(file: Path) -> Iterator[tuple[str, bytes]]:
    """(name, digest) of every tensor in a safetensors file.

    Layout of the format: 8 bytes of header length (little-endian), the JSON header, the data.
    """
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        data_start = 8 + header_size
        if header_size == 0 or data_start > file.stat().st_size:
            raise CheckpointError(f"{file} is not a complete safetensors file")
        try:
            header: dict[str, Any] = json.loads(stream.read(header_size))
        except ValueError as error:
            raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            start, end = (data_start + offset for offset in tensor["data_offsets"])
            if end > file.stat().st_size:
                raise CheckpointError(f"{file} is cut off inside tensor {name}")
            shape = json.dumps([tensor["dtype"], tensor["shape"]]).encode()
            sample = b"".join(_samples(stream, start, end))
            yield name, hashlib.sha256(shape + sample).digest()


def _samples(stream: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """Blocks at the start, middle and end of the byte range; all of it if it is small."""
    if end - start <= 3 * _BLOCK:
        stream.seek(start)
        yield stream.read(end - start)
        return
    for position in (start, (start + end) // 2, end - _BLOCK):
        stream.seek(position)
        yield stream.read(_BLOCK)
