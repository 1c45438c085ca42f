"""Truncated execution inside vLLM: the scheduler carries exits, the worker runs the plan."""
