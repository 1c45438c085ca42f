"""`serve` on a CPU chooses the KV cache's size, unless the user did."""

import pytest
from vllm.utils.cpu_resource_utils import MemoryNodeInfo

from raee_serve.errors import RaeeError
from raee_serve.server import vllm_server
from raee_serve.server.memory import GIB
from tests.tiny import saved, tiny_llama

pytestmark = pytest.mark.unit

VLLMS_SHARE = 0.92


@pytest.fixture
def machine(monkeypatch):
    """A CPU with this memory, and nobody who says how large the KV cache is to be."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(vllm_server.current_platform, "is_cpu", lambda: True)

    def of(total, available):
        info = MemoryNodeInfo(total * GIB, available * GIB)
        monkeypatch.setattr(vllm_server, "get_memory_node_info", lambda node: info)

    of(24, 20)
    return of


@pytest.fixture
def serve_args(tmp_path):
    """Of a tiny model and these flags, as `serve` has them when the table is loaded."""
    checkpoint = saved(tiny_llama(), tmp_path / "model")

    def of(*flags):
        args = vllm_server.parse_serve_args([str(checkpoint), *flags])
        args.model = args.model_tag
        return args

    return of


@pytest.mark.parametrize(
    ("flag", "value", "kept"),
    [
        ("--gpu-memory-utilization", "0.5", (0.5, None)),
        ("--gpu-memory-utilization", str(VLLMS_SHARE), (VLLMS_SHARE, None)),
        ("--device-memory-utilization", "0.4", (0.4, None)),
        ("--kv-cache-memory-bytes", "1000", (VLLMS_SHARE, 1000)),
    ],
)
def test_what_the_user_says_stands(machine, serve_args, flag, value, kept):
    machine(24, 1)  # too little for a choice of ours
    args = serve_args(flag, value)
    assert vllm_server.size_kv_cache(args) is None
    assert (args.gpu_memory_utilization, args.kv_cache_memory_bytes) == kept


def test_so_does_the_environment(machine, serve_args, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    args = serve_args()
    assert vllm_server.size_kv_cache(args) is None and args.kv_cache_memory_bytes is None


def test_other_devices_keep_vllms_choice(machine, serve_args, monkeypatch):
    monkeypatch.setattr(vllm_server.current_platform, "is_cpu", lambda: False)
    args = serve_args()
    assert vllm_server.size_kv_cache(args) is None
    assert (args.gpu_memory_utilization, args.kv_cache_memory_bytes) == (VLLMS_SHARE, None)


def test_without_room_the_server_does_not_start(machine, serve_args):
    machine(8, 1)
    with pytest.raises(RaeeError, match=r"of 8\.0 GiB 1\.0 are free"):
        vllm_server.size_kv_cache(serve_args())


def test_else_it_is_a_part_of_what_is_free(machine, serve_args):
    args = serve_args()
    assert vllm_server.size_kv_cache(args) == args.kv_cache_memory_bytes == 6 * GIB
    assert args.gpu_memory_utilization == VLLMS_SHARE
    machine(24, 10)
    assert 3 * GIB < vllm_server.size_kv_cache(serve_args()) < 5 * GIB


def test_engines_and_ranks_share_it(machine, serve_args):
    args = serve_args("--data-parallel-size", "2", "--tensor-parallel-size", "2")
    assert vllm_server.size_kv_cache(args) <= 6 * GIB // 4


def test_a_length_to_be_found_is_no_demand(machine, serve_args):
    assert vllm_server.size_kv_cache(serve_args("--max-model-len", "auto")) == 6 * GIB
