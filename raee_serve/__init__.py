"""RAEE: retrieval-augmented early exit, served through vLLM."""
