"""An LM head of a few of its rows, for steps whose requests may answer with these tokens only.

The head reads a weight of vocabulary x hidden_size from memory in every step, whatever the depth:
more than all layers of a small model with a large vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

LEAST_SHARE = 16
"""Of the vocabulary, a head of more than one token in so many saves too little."""


class _Rows(nn.Module):
    """Rows of a head's weight, in the form in which vLLM's `LogitsProcessor` takes a head."""

    tp_size = 1

    class _Linear(UnquantizedEmbeddingMethod):
        def apply(
            self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            return functional.linear(x, layer.weight, bias)

    quant_method = _Linear()

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def most_tokens(head: Any) -> int:
    """Up to how many tokens are few for `head`; none unless it is whole and plain."""
    plain = isinstance(getattr(head, "quant_method", None), UnquantizedEmbeddingMethod)
    return head.weight.shape[0] // LEAST_SHARE if plain and head.tp_size == 1 else 0


def narrow_logits(
    logits_processor: Any, head: Any, tokens: Sequence[int], hidden_states: torch.Tensor
) -> torch.Tensor:
    """Logits of `tokens`, and minus infinity for all others.

    logits_processor: vLLM's; its scale and soft cap apply. tokens: ids in the vocabulary.
    hidden_states: [rows, hidden_size]. Returns [rows, vocabulary] float32, in which the sampler
    works. The rows are taken anew each time, for weights can be reloaded.
    """
    columns = torch.tensor(tokens, device=hidden_states.device)
    logits = logits_processor(_Rows(head.weight[columns]), hidden_states)
    shape = (hidden_states.shape[0], logits_processor.org_vocab_size)
    everywhere = torch.full(shape, -torch.inf, device=hidden_states.device)
    return everywhere.index_copy_(1, columns, logits.float())
