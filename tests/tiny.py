"""Checkpoints of a few thousand random weights, real in everything but size."""

from pathlib import Path

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # wide, so that layers differ clearly in what they say
}


ENGINE_SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
}
"""Large enough for vLLM's CPU attention; pass as `**ENGINE_SIZES`."""


def tiny_llama(num_layers: int = 4, *, tied: bool = False, **sizes: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**SIZES, **sizes}, num_hidden_layers=num_layers, tie_word_embeddings=tied
    )
    return LlamaForCausalLM(config).eval()


def tiny_gemma3(num_layers: int = 4) -> Gemma3ForCausalLM:
    """Sliding and full attention in turn, a window shorter than the tests' prompts."""
    torch.manual_seed(0)
    layer_types = ["sliding_attention", "full_attention"] * num_layers
    config = Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=num_layers,
        layer_types=layer_types[:num_layers],
        sliding_window=4,
    )
    return Gemma3ForCausalLM(config).eval()


def saved(model: PreTrainedModel, directory: Path, **kwargs: object) -> Path:
    """The checkpoint directory of `model`; keyword arguments go to `save_pretrained`."""
    model.save_pretrained(directory, **kwargs)
    return directory
