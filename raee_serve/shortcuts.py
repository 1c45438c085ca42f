"""Exit shortcuts: for some layers a linear map from the state after them to the last layer's.

The map stands before final norm and LM head (Din et al. 2023, arXiv 2303.09435): what layer d says
through it is closer to what the whole model would say. `table/shortcuts.py` fits the maps,
the engine's workers apply them. They lie beside an exit table, in one safetensors file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from raee_serve.errors import BindingError, RaeeError, TableError
from raee_serve.fingerprint import BackboneIdentity

FORMAT = 1
"""Raised whenever the file changes in a way older readers would misread."""
FILE_NAME = "shortcuts.safetensors"


@dataclass(frozen=True, slots=True)
class Shortcut:
    """The map of one layer, from states between layers (hidden and residual added up) to such.

    weight: [hidden, hidden], applied as `state @ weight.T`; bias: [hidden].
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """[n, hidden] -> [n, hidden]."""
        return functional.linear(states, self.weight, self.bias)

    def to(self, *args: object) -> Shortcut:
        """As `Tensor.to`."""
        return Shortcut(self.weight.to(*args), self.bias.to(*args))  # type: ignore[call-overload]


@dataclass(frozen=True)
class Shortcuts:
    """The maps of one backbone by exit layer (1..num_layers - 1), ascending."""

    backbone: BackboneIdentity
    by_layer: Mapping[int, Shortcut]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.by_layer)

    @cached_property
    def digest(self) -> str:
        """Of the maps (12 hex): rows probed through them know them by it."""
        total = hashlib.sha256()
        for layer, shortcut in self.by_layer.items():
            total.update(str(layer).encode())
            for tensor in (shortcut.weight, shortcut.bias):
                total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()[:12]

    def check_backbone(self, backbone: BackboneIdentity, where: str) -> None:
        """Raises BindingError naming both backbones unless they are the same."""
        if backbone != self.backbone:
            raise BindingError(
                f"shortcuts {where} were fitted for backbone {self.backbone}, not for {backbone}"
            )

    def to(self, *args: object) -> Shortcuts:
        """As `Tensor.to`, of every map."""
        moved = {layer: shortcut.to(*args) for layer, shortcut in self.by_layer.items()}
        return Shortcuts(self.backbone, moved)

    def save(self, path: Path) -> None:
        """Whole or not at all, in float32; makes the directory."""
        tensors = {}
        for layer, shortcut in self.by_layer.items():
            tensors[f"{layer}.weight"] = shortcut.weight.detach().float().cpu().contiguous()
            tensors[f"{layer}.bias"] = shortcut.bias.detach().float().cpu().contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        metadata = {"format": str(FORMAT), "backbone": json.dumps(asdict(self.backbone))}
        save_file(tensors, unfinished, metadata)
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> Shortcuts:
        """Raises TableError naming the file if it is missing, damaged or of another format."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != str(FORMAT):
                    raise TableError(
                        f"shortcuts {path}: format is {metadata.get('format')!r}; this version "
                        f"reads {FORMAT!r}"
                    )
                backbone = BackboneIdentity(**json.loads(metadata["backbone"]))
                layers = sorted({int(name.partition(".")[0]) for name in file.keys()})  # noqa: SIM118
                maps = {layer: _read(file, layer) for layer in layers}
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as e:
            if isinstance(e, RaeeError):
                raise
            raise TableError(
                f"shortcuts {path} cannot be read ({type(e).__name__}: {e}); "
                "fit them with raee-serve shortcuts fit"
            ) from e
        shortcuts = cls(backbone, maps)
        shortcuts._check(path)
        return shortcuts

    def _check(self, path: Path) -> None:
        last = self.backbone.num_layers - 1
        for layer, shortcut in self.by_layer.items():
            hidden = len(shortcut.bias)
            if not 1 <= layer <= last or shortcut.weight.shape != (hidden, hidden):
                raise TableError(
                    f"shortcuts {path}: layer {layer} has a map {tuple(shortcut.weight.shape)}; "
                    f"allowed: square ones at layers 1..{last}"
                )


def beside_table(uri: str) -> Path | None:
    """Where the shortcuts of an exit table lie: in its directory; None where it has none of its
    own, in object storage."""
    return None if "://" in uri else Path(uri) / FILE_NAME


def find_shortcuts(uri: str | None, given: str | None) -> Path | None:
    """The file to use: the one that is given, else the one beside the table, if it is there."""
    if given is not None:
        return Path(given)
    beside = None if uri is None else beside_table(uri)
    return beside if beside is not None and beside.is_file() else None


def stored_shortcuts(
    uri: str | None, given: str | None, backbone: BackboneIdentity
) -> Shortcuts | None:
    """What `find_shortcuts` finds, if anything. Raises TableError for a file that is of no use, a
    BindingError for another backbone's."""
    path = find_shortcuts(uri, given)
    if path is None:
        return None
    shortcuts = Shortcuts.load(path)
    shortcuts.check_backbone(backbone, str(path))
    return shortcuts


def _read(file: safe_open, layer: int) -> Shortcut:
    return Shortcut(file.get_tensor(f"{layer}.weight"), file.get_tensor(f"{layer}.bias"))
