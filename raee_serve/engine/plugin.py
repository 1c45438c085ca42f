"""Entry point that vLLM calls in each of its processes (`vllm.general_plugins`)."""

from raee_serve import vector_math
from raee_serve.engine.models import SUPPORTED
from raee_serve.engine.settings import is_off


def register() -> None:
    """Give the supported architectures their truncatable classes. Safe to call again.

    Without a worker of ours the classes take vLLM's own path, so other uses of vLLM in the
    same environment are left alone. So is everything while the kill switch is set.

    The first call comes before any model is built, in time for its rotary embeddings.
    """
    if is_off():
        return
    vector_math.settle()
    from vllm import ModelRegistry

    for architecture, qualified_name in SUPPORTED.items():
        ModelRegistry.register_model(architecture, qualified_name)
