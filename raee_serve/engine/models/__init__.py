"""Architectures that can run truncated, by the name vLLM knows them under."""

_HERE = "raee_serve.engine.models"

SUPPORTED = {
    "GemmaForCausalLM": f"{_HERE}.gemma:TruncatedGemmaForCausalLM",
    "Gemma2ForCausalLM": f"{_HERE}.gemma2:TruncatedGemma2ForCausalLM",
    "Gemma3ForCausalLM": f"{_HERE}.gemma3:TruncatedGemma3ForCausalLM",
    "LlamaForCausalLM": f"{_HERE}.llama:TruncatedLlamaForCausalLM",
    "MistralForCausalLM": f"{_HERE}.mistral:TruncatedMistralForCausalLM",
}
"""Architecture to `module:class`; a multimodal Gemma 3 runs its text as `Gemma3ForCausalLM`."""
