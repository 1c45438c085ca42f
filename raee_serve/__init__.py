"""Retrieval-augmented early exit for vLLM: each request runs only the decoder layers it needs."""

__version__ = "0.1.0"
