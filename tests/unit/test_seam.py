"""A vLLM that differs from the one a seam was checked on is refused by name."""

import pytest

pytest.importorskip("vllm")

from raee_serve_patches import (
    Seam,
    SeamError,
    check_seams,
    depth_kv_cache,
    segment_groups,
    slot_mapping,
)

pytestmark = pytest.mark.unit

SYMBOL = "vllm.v1.request:Request.update_block_hashes"


@pytest.mark.parametrize("model_runner", [1, 2])
def test_installed_vllm_passes(model_runner):
    check_seams(model_runner)
    depth_kv_cache.SEAM.check()
    segment_groups.SEAM.check()
    slot_mapping.SEAM.check()


def test_changed_source_is_named():
    with pytest.raises(SeamError, match=r"update_block_hashes.*checked was 000000000000"):
        Seam("s", {SYMBOL: "000000000000"}).check()


@pytest.mark.parametrize("gone", ["vllm.v1.request:Request.nothing", "vllm.nowhere:f"])
def test_missing_symbol_is_named(gone):
    with pytest.raises(SeamError, match="vLLM has no"):
        Seam("s", {gone: "000000000000"}).check()
