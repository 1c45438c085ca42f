"""Block hashes of one depth never equal those of another."""

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from raee_serve_patches.request_salt import salt_block_hashes

pytestmark = pytest.mark.unit

BLOCK, NUM_LAYERS = 16, 30


@pytest.fixture(scope="module")
def hasher():
    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK, sha256)


def arriving(hasher, client_salt=None):
    return Request(
        request_id="r",
        prompt_token_ids=list(range(3 * BLOCK + 5)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        cache_salt=client_salt,
        block_hasher=hasher,
    )


def hashes(hasher, exit_layer, client_salt=None):
    request = arriving(hasher, client_salt)
    salt_block_hashes(request, exit_layer, NUM_LAYERS)
    assert len(request.block_hashes) == 3
    return request.block_hashes


def test_depths_and_client_salts_are_all_kept_apart(hasher):
    seen = [
        block
        for depth in (1, 2, 15, NUM_LAYERS)
        for salt in (None, "tenant-a", "tenant-b")
        for block in hashes(hasher, depth, salt)
    ]
    assert len(set(seen)) == len(seen)


def test_full_depth_keeps_vanilla_hashes(hasher):
    assert hashes(hasher, NUM_LAYERS) == arriving(hasher).block_hashes


def test_client_cannot_name_another_depths_blocks(hasher):
    forged = "\x00raee-exit-layer=12"
    assert not set(hashes(hasher, NUM_LAYERS, forged)) & set(hashes(hasher, 12))
    assert not set(hashes(hasher, 5, forged)) & set(hashes(hasher, 12, forged))
