"""Every reach into a vLLM symbol that is not a documented extension point, one file a seam."""

from raee_serve_patches.seam import Seam, SeamError

__all__ = ["Seam", "SeamError", "check_seams"]


def check_seams() -> None:
    """Check every seam against the installed vLLM. Raises `SeamError` at the first mismatch."""
    from raee_serve_patches import lora_rows, request_salt, seeded_chunks, v1_step

    for module in (lora_rows, request_salt, seeded_chunks, v1_step):
        module.SEAM.check()
