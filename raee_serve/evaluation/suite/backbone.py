"""What studies ask of a backbone beyond its layers' answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from raee_serve.table.probe import LayerProbe, mean_per_row


class StudiedBackbone(LayerProbe):
    """A backbone whose states can be read and whose layers can be left out."""

    @torch.inference_mode()
    def states(
        self, sequences: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> dict[int, Tensor]:
        """As `LayerProbe.states`, also of layer 0: what the first layer is given."""
        with self._inputs() as before:
            states = super().states(sequences, [layer for layer in layers if layer])
        if 0 in layers:
            states[0] = before[0][_real(sequences)]
        return states

    def mean_states(
        self, prompts: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> NDArray[np.float32]:
        """[n, len(layers), hidden]: mean over a prompt's tokens of the state after each layer."""
        states, lengths = self.states(prompts, layers), [len(prompt) for prompt in prompts]
        return np.stack([mean_per_row(states[layer], lengths) for layer in layers], axis=1)

    def block_influence(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """[num_layers]: 1 - mean cosine similarity of the states before and after a layer, over all
        tokens. The less, the less a layer does (ShortGPT, arXiv 2403.03853)."""
        states = self.states(prompts, range(self.num_layers + 1))
        pairs = [(states[i].float(), states[i + 1].float()) for i in range(self.num_layers)]
        similarity = [functional.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]
        return 1 - torch.stack(similarity).double().cpu().numpy()

    @contextmanager
    def without(self, layers: Sequence[int]) -> Iterator[None]:
        """While open, these layers (1-based) are not there."""
        whole, num_layers, config = self._decoder.layers, self.num_layers, self._decoder.config
        kept = [i for i in range(num_layers) if i + 1 not in set(layers)]
        changed: dict[str, Any] = {"num_hidden_layers": len(kept)}
        if kinds := getattr(config, "layer_types", None):  # which the decoder goes by
            changed["layer_types"] = [kinds[i] for i in kept]
        configured = {name: getattr(config, name) for name in changed}
        self._decoder.layers, self.num_layers = nn.ModuleList(whole[i] for i in kept), len(kept)
        _set(config, changed)
        try:
            yield
        finally:
            self._decoder.layers, self.num_layers = whole, num_layers
            _set(config, configured)

    @contextmanager
    def _inputs(self) -> Iterator[list[Tensor]]:
        """Filled with what the first layer is given, [n, longest, hidden]."""
        taken: list[Tensor] = []
        handle = self._decoder.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: taken.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        try:
            yield taken
        finally:
            handle.remove()


def _real(sequences: Sequence[Sequence[int]]) -> Tensor:
    """[n, longest] bool: where a sequence has a token."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return torch.arange(int(lengths.max()))[None] < lengths[:, None]


def _set(config: Any, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        setattr(config, name, value)
