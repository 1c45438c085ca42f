"""Seam: put a request's exit layer into its prefix-cache block hashes.

Upstream: `Request.cache_salt`, `Request.block_hashes`, `Request.update_block_hashes`.
Checked on: vLLM 0.32.0.
Why no extension point serves: hashes are computed when the engine makes its `Request`, before
a scheduler class sees it, and the salt cannot be set through `SamplingParams`. Doing it here,
not in the front end, covers offline `vllm.LLM` and every HTTP route with one piece of code.
Retired by: a hook for extra block-hash keys; not used where KV groups grow with depth
(`depth_kv_cache.py`).
"""

from typing import TYPE_CHECKING

from raee_serve_patches.seam import Seam

if TYPE_CHECKING:
    from vllm.v1.request import Request

SEAM = Seam(
    "request_salt",
    {
        "vllm.v1.request:Request.update_block_hashes": "fbb2f6a93ec8",
        "vllm.v1.core.kv_cache_utils:get_request_block_hasher": "68c195e3879c",
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": "fabb6e4b928a",
    },
)

_MARK = "\x00raee-exit-layer="


def salt_block_hashes(request: "Request", exit_layer: int, num_layers: int) -> None:
    """Make the request's prefix-cache blocks distinct from those of any other depth.

    The client's own `cache_salt` keeps its effect. Full-depth requests keep vLLM's hashes,
    unless their salt holds our mark: a client must not be able to name another depth's blocks.
    """
    client_salt = request.cache_salt or ""
    if exit_layer == num_layers and _MARK not in client_salt:
        return
    request.cache_salt = f"{client_salt}{_MARK}{exit_layer}"
    request.block_hashes.clear()
    request.update_block_hashes()
