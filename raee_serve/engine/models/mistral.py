"""Mistral, and Ministral 3 by the same class."""

from vllm.model_executor.models.mistral import MistralForCausalLM

from raee_serve.engine.models.truncated import TruncatedExecution


class TruncatedMistralForCausalLM(TruncatedExecution, MistralForCausalLM):
    """vLLM's `MistralForCausalLM` with per-request depth."""
