"""Checkpoints of a few thousand random weights, real in everything but size."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from raee_serve.fingerprint import identify_backbone
from raee_serve.shortcuts import Shortcut, Shortcuts

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


WITH_TOKENIZER = {
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}
"""For models that borrow the SmolLM2 tokenizer."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_RANK = 8

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def tiny_llama(
    num_layers: int = 4, *, tied: bool = False, seed: int = 0, **config: float
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(**{**SIZES, **config}, num_hidden_layers=num_layers, tie_word_embeddings=tied)
    ).eval()


def tiny_gemma3(num_layers: int = 4, *, seed: int = 0, **config: float) -> Gemma3ForCausalLM:
    """Sliding and full attention in turn, a window shorter than the tests' prompts."""
    torch.manual_seed(seed)
    layer_types = ["sliding_attention", "full_attention"] * num_layers
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **{**SIZES, "sliding_window": 4, **config},
            num_hidden_layers=num_layers,
            layer_types=layer_types[:num_layers],
        )
    ).eval()


def tiny_gemma(num_layers: int = 4, *, seed: int = 0, **config: float) -> GemmaForCausalLM:
    torch.manual_seed(seed)
    sizes = {**SIZES, **config}
    return GemmaForCausalLM(GemmaConfig(**sizes, num_hidden_layers=num_layers)).eval()


def tiny_gemma2(num_layers: int = 4, *, seed: int = 0, **config: float) -> Gemma2ForCausalLM:
    """A window shorter than the tests' prompts, and caps low enough to bite."""
    torch.manual_seed(seed)
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}
    sizes = {**SIZES, "sliding_window": 4, **caps, **config}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, num_hidden_layers=num_layers)).eval()


def tiny_mistral(num_layers: int = 4, *, seed: int = 0, **config: float) -> MistralForCausalLM:
    torch.manual_seed(seed)
    sizes = {**SIZES, "sliding_window": None, **config}
    return MistralForCausalLM(MistralConfig(**sizes, num_hidden_layers=num_layers)).eval()


def with_random_norms(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with norm weights that are not all alike, which would hide a norm left out."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def write_adapter(model: PreTrainedModel, directory: Path, seed: int) -> Path:
    """A random LoRA adapter of all projections in PEFT's format.

    It is merged into `model`, whose checkpoint directory is returned.
    """
    torch.manual_seed(seed)
    weights = {}
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS):
            a = torch.randn(ADAPTER_RANK, module.in_features) * 0.1
            b = torch.randn(module.out_features, ADAPTER_RANK) * 0.1
            module.weight.data += b @ a
            weights[f"base_model.model.{name}.lora_A.weight"] = a
            weights[f"base_model.model.{name}.lora_B.weight"] = b
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": ADAPTER_RANK, "lora_alpha": ADAPTER_RANK, "bias": "none"}
    config["target_modules"] = list(PROJECTIONS)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return saved(model, directory / "merged")


def saved(model: PreTrainedModel, directory: Path, **kwargs: object) -> Path:
    """The checkpoint directory of `model`; keyword arguments go to `save_pretrained`."""
    model.save_pretrained(directory, **kwargs)
    return directory


def tokenized_llama(directory: Path, tokenizer: Path, seed: int = 0) -> Path:
    """A checkpoint that takes text, by the tokenizer of another one."""
    return tokenized(tiny_llama(seed=seed, **WITH_TOKENIZER), directory, tokenizer)


def tokenized_gemma3(directory: Path, tokenizer: Path, seed: int = 0) -> Path:
    """As `tokenized_llama`, with capped logits and a window of 5 tokens."""
    model = tiny_gemma3(
        seed=seed, sliding_window=5, final_logit_softcapping=4.0, pad_token_id=0, **WITH_TOKENIZER
    )
    return tokenized(model, directory, tokenizer)


def tokenized(model: PreTrainedModel, directory: Path, tokenizer: Path) -> Path:
    """`model` saved with the tokenizer of another checkpoint."""
    saved(with_random_norms(model), directory)
    for file in TOKENIZER_FILES:
        shutil.copy(tokenizer / file, directory / file)
    return directory


def random_shortcuts(checkpoint: Path, layers: Sequence[int], seed: int = 0) -> Shortcuts:
    """Maps of a checkpoint that change what most rows say, and are far from leaving it alone."""
    torch.manual_seed(seed)
    hidden = json.loads((checkpoint / "config.json").read_text())["hidden_size"]
    maps = {d: Shortcut(torch.randn(hidden, hidden), torch.randn(hidden)) for d in layers}
    return Shortcuts(identify_backbone(checkpoint), maps)
