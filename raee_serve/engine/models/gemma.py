"""The first Gemma."""

from vllm.model_executor.models.gemma import GemmaForCausalLM

from raee_serve.engine.models.truncated import TruncatedExecution


class TruncatedGemmaForCausalLM(TruncatedExecution, GemmaForCausalLM):
    """vLLM's `GemmaForCausalLM` with per-request depth."""
