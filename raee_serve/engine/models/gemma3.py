"""Gemma 3 text models, alone or inside `Gemma3ForConditionalGeneration`."""

from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM

from raee_serve.engine.models.truncated import TruncatedExecution


class TruncatedGemma3ForCausalLM(TruncatedExecution, Gemma3ForCausalLM):
    """vLLM's `Gemma3ForCausalLM` with per-request depth."""

    residual_norm = "pre_feedforward_layernorm"
