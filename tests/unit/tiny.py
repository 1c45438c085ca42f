"""Tiny random checkpoints of both families, and rows for tables about them."""

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from raee_serve.fingerprint import BackboneIdentity
from raee_serve.table.schema import EncoderIdentity, TableMetadata, TaskEntry, TaskRows
from raee_serve.table.tasks import get_task

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

SIZES = {
    "vocab_size": 49152,  # of the SmolLM2 tokenizer they borrow
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # large enough that layers disagree
}


def tiny_llama(directory: Path, tokenizer: Path, seed: int = 0) -> Path:
    config = LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2)
    return _save(LlamaForCausalLM, config, directory, tokenizer, seed)


def tiny_gemma3(directory: Path, tokenizer: Path, seed: int = 0) -> Path:
    """Sliding layers of 5 tokens between full ones, logits capped at 4."""
    config = Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
        final_logit_softcapping=4.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _save(Gemma3ForCausalLM, config, directory, tokenizer, seed)


def _save(architecture, config, directory, tokenizer, seed):
    set_seed(seed)
    model = architecture(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones (or zeros) would hide a norm that is skipped
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(directory)
    for file in TOKENIZER_FILES:
        shutil.copy(tokenizer / file, directory / file)
    return directory


BACKBONE = BackboneIdentity("LlamaForCausalLM", 4, "ab" * 32)
ENCODER = EncoderIdentity("minilm", 8, "cd" * 32)


def metadata(encoder: EncoderIdentity = ENCODER) -> TableMetadata:
    return TableMetadata(BACKBONE, encoder)


def entry(name: str) -> TaskEntry:
    task = get_task(name)
    layers = (1, 2, 3, 4) if task.kind == "labels" else (2, 4)
    return TaskEntry.of(task, tuple(range(10, 10 + len(task.label_words))), layers)


def label_rows(ids: list[str], vectors=None, right=None, golds=None) -> TaskRows:
    """Rows of a two-label task. right: [n, 4] probability of gold by layer, default 0.8."""
    n = len(ids)
    golds = np.arange(n) % 2 if golds is None else np.array(golds)
    p_gold = np.full((n, 4), 0.8) if right is None else np.array(right, float)
    p = np.where(np.arange(2) == golds[:, None, None], p_gold[..., None], 1 - p_gold[..., None])
    return TaskRows(
        ids,
        unit_vectors(n) if vectors is None else vectors,
        golds.astype(np.int32),
        label_logprobs=np.log(p).astype(np.float32),
    )


def unit_vectors(n: int, dimension: int = 8, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
