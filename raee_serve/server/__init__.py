"""The OpenAI-compatible server: vLLM's own, with admission in front of it."""
