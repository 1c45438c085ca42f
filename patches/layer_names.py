"""vLLM's layer names and the layers they stand for."""

from collections.abc import Sequence
from functools import cache

from vllm.model_executor.models.utils import extract_layer_index

_index = cache(extract_layer_index)


def names_within(names: Sequence[str], first: int, end: int) -> list[str]:
    """Those of layers `first .. end - 1`."""
    return [name for name in names if first <= _index(name) < end]
