"""Llama and the models that share its class in vLLM."""

from vllm.model_executor.models.llama import LlamaForCausalLM

from raee_serve.engine.models.truncated import TruncatedExecution


class TruncatedLlamaForCausalLM(TruncatedExecution, LlamaForCausalLM):
    """vLLM's `LlamaForCausalLM` with per-request depth."""
