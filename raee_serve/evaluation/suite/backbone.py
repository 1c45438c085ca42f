"""What studies ask of a backbone beyond its layers' answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from raee_serve.table.probe import LayerProbe


class StudiedBackbone(LayerProbe):
    """A backbone whose states can be read and whose layers can be left out."""

    @torch.inference_mode()
    def mean_states(
        self, prompts: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> NDArray[np.float32]:
        """[n, len(layers), hidden]: mean over a prompt's tokens of the state after each layer.

        Layer 0 is the input of the first one: the tokens' embeddings.
        """
        mask = _mask(prompts).to(self.device)
        share = mask / mask.sum(dim=1, keepdim=True)

        def mean(state: Tensor) -> Tensor:
            return (state.float() * share[..., None]).sum(dim=1)

        with self._inputs() as before, self._capture([i for i in layers if i], mean) as states:
            self.bare_forward(prompts)
        states[0] = mean(before[0])
        return torch.stack([states[layer] for layer in layers], dim=1).cpu().numpy()

    @torch.inference_mode()
    def block_influence(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """[num_layers]: 1 - mean cosine similarity of the states before and after a layer, over all
        tokens. The less, the less a layer does (ShortGPT, arXiv 2403.03853)."""
        real = _mask(prompts).bool()
        every_layer = range(1, self.num_layers + 1)
        with self._inputs() as before, self._capture(every_layer, lambda s: s[real]) as states:
            self.bare_forward(prompts)
        states[0] = before[0][real]
        pairs = [(states[layer - 1].float(), states[layer].float()) for layer in every_layer]
        similarity = [functional.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]
        return 1 - torch.stack(similarity).double().cpu().numpy()

    @contextmanager
    def without(self, layers: Sequence[int]) -> Iterator[None]:
        """While open, these layers (1-based) are not there."""
        whole, num_layers = self._decoder.layers, self.num_layers
        kept = [layer for i, layer in enumerate(whole, 1) if i not in set(layers)]
        self._decoder.layers, self.num_layers = nn.ModuleList(kept), len(kept)
        config = self._decoder.config
        configured, config.num_hidden_layers = config.num_hidden_layers, len(kept)
        try:
            yield
        finally:
            self._decoder.layers, self.num_layers = whole, num_layers
            config.num_hidden_layers = configured

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


def _mask(prompts: Sequence[Sequence[int]]) -> Tensor:
    """[n, longest] float, 1 where a prompt has a token."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return (torch.arange(int(lengths.max()))[None] < lengths[:, None]).float()
