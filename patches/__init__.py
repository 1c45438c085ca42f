"""Every reach into a vLLM symbol that is not a documented extension point, one file a seam."""

from raee_serve_patches.seam import Seam, SeamError

__all__ = ["Seam", "SeamError", "check_seams"]


def check_seams() -> None:
    """Check the seams that every engine rests on. Raises `SeamError` at the first mismatch.

    `depth_kv_cache` is checked where it is switched on.
    """
    from raee_serve_patches import lora_rows, request_salt, seeded_chunks, v1_step

    for module in (lora_rows, request_salt, seeded_chunks, v1_step):
        module.SEAM.check()
