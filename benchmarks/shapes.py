"""Models of which only the shape counts: a `config.json` for vLLM's dummy weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """config: all that the model's `config.json` says but how many layers there are."""

    name: str
    num_layers: int
    config: dict[str, Any]

    def cut(self, depth: int) -> dict[str, Any]:
        """The `config.json` of its first `depth` layers."""
        return {**self.config, "num_hidden_layers": depth}

    def write(self, depth: int, directory: Path) -> Path:
        """That `config.json` in a directory of its own, which is returned."""
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.cut(depth)), encoding="utf-8")
        return directory

    @property
    def dtype(self) -> str:
        return self.config["dtype"]

    def weight_bytes(self, depth: int) -> int:
        """Of the first `depth` layers with embeddings and head."""
        c = self.config
        heads = c["num_attention_heads"] + c["num_key_value_heads"]
        layer = 2 * heads * c["head_dim"] + 3 * c["intermediate_size"]
        embeddings = c["vocab_size"] * (1 if c["tie_word_embeddings"] else 2)
        return (depth * layer + embeddings) * c["hidden_size"] * self._value_bytes

    def kv_bytes(self, depth: int, tokens: int) -> int:
        """Of that many tokens' keys and values."""
        c = self.config
        return tokens * depth * 2 * c["num_key_value_heads"] * c["head_dim"] * self._value_bytes

    @property
    def _value_bytes(self) -> int:
        return {"bfloat16": 2, "float32": 4}[self.dtype]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "llama-3.1-8b",
            32,
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "dtype": "bfloat16",
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
                "tie_word_embeddings": False,
            },
        ),
        Shape(
            "gemma-2-9b",
            42,
            {
                "architectures": ["Gemma2ForCausalLM"],
                "model_type": "gemma2",
                "dtype": "bfloat16",
                "vocab_size": 256000,
                "hidden_size": 3584,
                "intermediate_size": 14336,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 256,
                "max_position_embeddings": 8192,
                "sliding_window": 4096,
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                "tie_word_embeddings": True,
            },
        ),
        Shape(
            "tiny",
            6,
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "dtype": "float32",
                "vocab_size": 512,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "max_position_embeddings": 1024,
                "initializer_range": 0.1,
                "tie_word_embeddings": False,
            },
        ),
    )
}
"""The published sizes, and one that is there within seconds, for parity and for trying out."""
