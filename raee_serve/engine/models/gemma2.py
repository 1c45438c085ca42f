"""Gemma 2: sliding and full attention in turn, attention scores and logits capped."""

from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM

from raee_serve.engine.models.truncated import TruncatedExecution


class TruncatedGemma2ForCausalLM(TruncatedExecution, Gemma2ForCausalLM):
    """vLLM's `Gemma2ForCausalLM` with per-request depth."""

    residual_norm = "pre_feedforward_layernorm"
