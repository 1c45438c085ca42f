"""What the backbone would answer after each of its layers.

The state after decoder layer d, through the final norm and the LM head, gives the logits of the
checkpoint physically cut to its first d layers. Hooks take that state where it is needed, so one
ordinary forward pass serves all layers, and only the head's rows that matter are applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from raee_serve import vector_math
from raee_serve.errors import CheckpointError
from raee_serve.shortcuts import Shortcuts

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""Of a backbone's weights, by what commands call them."""
HALF_MAX = 65504.0
"""Largest number of float16."""
HEAD_ROWS = 128
"""Positions put through the whole LM head at a time: times a 262,144-word vocabulary in float32
that is 134 MB."""


class LayerProbe:
    """A backbone in transformers whose every layer can be asked.

    dtype: float32 on CPUs without native bf16, else bf16, unless given.
    shortcuts: through which references are scored too, None for the plain head alone.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        dtype: torch.dtype | None = None,
        shortcuts: Shortcuts | None = None,
    ) -> None:
        """Raises CheckpointError if the checkpoint is not a decoder with layers and final norm."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype or default_dtype(self.device)
        self.shortcuts = shortcuts
        vector_math.settle()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=self.dtype)
        except (OSError, ValueError) as e:
            raise CheckpointError(f"cannot load backbone {checkpoint}: {e}") from e
        self._decoder = model.eval().to(self.device).get_decoder()
        if not hasattr(self._decoder, "layers") or not hasattr(self._decoder, "norm"):
            raise CheckpointError(
                f"backbone {checkpoint} ({type(model).__name__}) is not a Llama- or Gemma-family "
                "decoder: it has no `layers` followed by a `norm`"
            )
        self._head: Tensor = model.get_output_embeddings().weight  # [vocabulary, hidden]
        config = model.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.num_layers = len(self._decoder.layers)
        self.max_length = int(config.max_position_embeddings)

    @torch.inference_mode()
    def bare_forward(self, prompts: Sequence[Sequence[int]]) -> None:
        """The decoder alone, nothing captured and no head: what probing is compared with."""
        self._decoder(input_ids=self._pad(prompts), use_cache=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that its time is its own

    @torch.inference_mode()
    def label_states(
        self, prompts: Sequence[Sequence[int]], layers: Sequence[int], token_ids: Sequence[int]
    ) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """The states that label probes read, and what the plain head makes of them.

        prompts: n lists of token ids, none empty, none longer than `max_length`.
        Returns [n, len(layers), hidden_size], the last position's states at `layers` after the
        final norm, and [n, num_layers, len(token_ids)], log-softmax over these tokens.
        """
        rows = torch.arange(len(prompts))
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        every_layer = range(1, self.num_layers + 1)
        with self._capture(every_layer, lambda state: state[rows, last]) as states:
            self.bare_forward(prompts)
        hidden = self._decoder.norm(torch.stack([states[layer] for layer in every_layer], dim=1))
        logits = self._capped(functional.linear(hidden, self._head[list(token_ids)]))
        logprobs = logits.log_softmax(dim=-1).cpu().numpy()
        chosen = hidden[:, [layer - 1 for layer in layers]].float().clamp(-HALF_MAX, HALF_MAX)
        return chosen.to(torch.float16).cpu().numpy(), logprobs

    @torch.inference_mode()
    def states(
        self, sequences: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> dict[int, Tensor]:
        """By layer: [sum of lengths, hidden], the states after it at every position, in order."""
        lengths = [len(sequence) for sequence in sequences]
        rows = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(lengths))
        columns = torch.cat([torch.arange(length) for length in lengths])
        with self._capture(layers, lambda state: state[rows, columns]) as states:
            self.bare_forward(sequences)
        return states

    @torch.inference_mode()
    def top_tokens(self, states: Tensor) -> Tensor:
        """[n, hidden] states before the final norm -> [n] most probable tokens."""
        states = states.to(self.device, self.dtype)
        return torch.cat([self._logits(s).argmax(1) for s in states.split(HEAD_ROWS)])

    @torch.inference_mode()
    def reference_scores(
        self,
        prompts: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
        layers: Sequence[int],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """How each prompt's reference, taken as given, fares at `layers`, full depth last, and
        then through each of the shortcuts.

        Returns the shares of its positions at which the exit's most probable token is full
        depth's, and the reference's: both [n, exits].
        """
        assert layers[-1] == self.num_layers, f"full depth is not the last of {layers}"
        sequences = [[*p, *r[:-1]] for p, r in zip(prompts, references, strict=True)]
        lengths = [len(reference) for reference in references]
        rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(lengths))
        predicting = [
            torch.arange(len(p) - 1, len(p) - 1 + n) for p, n in zip(prompts, lengths, strict=True)
        ]
        columns = torch.cat(predicting)
        targets = torch.tensor([t for r in references for t in r], device=self.device)
        maps = {} if self.shortcuts is None else self.shortcuts.by_layer
        captured = sorted({*layers, *maps})
        with self._capture(captured, lambda state: state[rows, columns]) as states:
            self.bare_forward(sequences)
        exits = [states[layer] for layer in layers]
        exits += [maps[layer].to(self.device, self.dtype)(states[layer]) for layer in maps]
        tops = torch.stack([self.top_tokens(exit) for exit in exits], dim=1)
        agreement = (tops == tops[:, len(layers) - 1, None]).float()
        hits = (tops == targets[:, None]).float()
        return mean_per_row(agreement, lengths), mean_per_row(hits, lengths)

    def _pad(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """[n, longest], padded on the right.

        No attention mask is needed: attention is causal, so no real position sees the padding.
        """
        assert all(sequences), "an empty prompt has no last position"
        longest = max(map(len, sequences))
        assert longest <= self.max_length, f"{longest} tokens exceed {self.max_length}"
        padded = [[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences]
        return torch.tensor(padded, device=self.device)

    @contextmanager
    def _capture(
        self, layers: Sequence[int], select: Callable[[Tensor], Tensor]
    ) -> Iterator[dict[int, Tensor]]:
        """Fills layer -> select(state after that layer, [n, longest, hidden]) while it is open."""
        states: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[[object, object, Tensor], None]:
            def hook(_module: object, _inputs: object, output: Tensor) -> None:
                assert isinstance(output, Tensor), f"layer output is a {type(output).__name__}"
                states[layer] = select(output)

            return hook

        handles = [
            self._decoder.layers[layer - 1].register_forward_hook(keep(layer)) for layer in layers
        ]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def _logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary] float32."""
        return self._capped(functional.linear(self._decoder.norm(hidden), self._head))

    def _capped(self, logits: Tensor) -> Tensor:
        """In float32, capped as the model caps its own."""
        logits = logits.float()
        return logits if self._softcap is None else self._softcap * (logits / self._softcap).tanh()


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device computes in it; CPUs without it emulate it several times slower."""
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def mean_per_row(values: Tensor, lengths: Sequence[int]) -> NDArray[np.float32]:
    """[sum(lengths), m] -> [len(lengths), m], the mean over each row's positions."""
    means = [part.mean(dim=0) for part in values.float().split(list(lengths))]
    return torch.stack(means).cpu().numpy()
