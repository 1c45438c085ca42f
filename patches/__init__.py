"""Every reach into a vLLM symbol that is not a documented extension point, one file a seam."""

from raee_serve_patches.seam import Seam, SeamError

__all__ = ["Seam", "SeamError", "check_seams"]


def check_seams(model_runner: int = 1) -> None:
    """Check the seams that an engine of this model runner (1 or 2) rests on.

    Raises `SeamError` at the first mismatch. Those of a KV cache by depth are checked where it is
    switched on.
    """
    from raee_serve_patches import (
        allowed_tokens,
        compiled_layers,
        lora_rows,
        request_salt,
        sampler_columns,
        seeded_chunks,
        v1_step,
        v2_graphs,
        v2_step,
    )

    v1 = (
        allowed_tokens.SEAM,
        lora_rows.SEAM,
        sampler_columns.SEAM,
        seeded_chunks.SEAM,
        v1_step.SEAM,
    )
    v2 = (v2_step.SEAM, v2_graphs.SEAM, compiled_layers.SEAM, sampler_columns.V2_SEAM)
    for seam in (request_salt.SEAM, *{1: v1, 2: v2}[model_runner]):
        seam.check()
