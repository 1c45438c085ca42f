"""Architectures that can run truncated, by the name vLLM knows them under."""

SUPPORTED = {
    "LlamaForCausalLM": "raee_serve.engine.models.llama:TruncatedLlamaForCausalLM",
    "Gemma3ForCausalLM": "raee_serve.engine.models.gemma3:TruncatedGemma3ForCausalLM",
}
"""Architecture to `module:class`; a multimodal Gemma 3 runs its text through the second."""
