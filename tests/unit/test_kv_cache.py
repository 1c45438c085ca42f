"""The KV cache by depth: no layer read that was not written, no block lost, without an engine.

Requests of random depths and shared beginnings are admitted, grow, are preempted, finish and are
aborted against vLLM's own block pool; a memory that remembers what stands in each slot plays the
worker. RAEE_STRESS_REQUESTS sets how many come.
"""

import os
import random
from dataclasses import dataclass, field
from itertools import accumulate, count

import pytest

pytest.importorskip("vllm")

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_groups,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request, RequestStatus

from raee_serve.engine.compat import UnsupportedError
from raee_serve.engine.kv_cache import is_split, register_segments, split_by_depth
from raee_serve.engine.segments import Segment
from raee_serve.engine.settings import engine_options, exit_args
from raee_serve_patches.depth_kv_cache import DepthKVCacheManager

pytestmark = pytest.mark.unit

NUM_LAYERS, BLOCK, MAX_LEN = 12, 4, 96
NUM_REQUESTS = int(os.environ.get("RAEE_STRESS_REQUESTS", "800"))
SIZES = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}


def layer_specs(make=FullAttentionSpec, **fields):
    return {f"model.layers.{i}.attn": make(**SIZES, **fields) for i in range(NUM_LAYERS)}


@pytest.fixture(scope="module", autouse=True)
def hashing():
    init_none_hash(sha256)
    register_segments()


def new_manager(count=4, num_blocks=200, **changes):
    specs = split_by_depth(layer_specs(), NUM_LAYERS, count)
    by_spec = {}
    for name, spec in specs.items():
        by_spec.setdefault(spec, []).append(name)
    groups = [KVCacheGroupSpec(names, spec) for spec, names in by_spec.items()]
    return DepthKVCacheManager(
        lambda request: request.sampling_params.extra_args["raee_exit_layer"],
        **{
            "kv_cache_config": KVCacheConfig(num_blocks, [], groups),
            "max_model_len": MAX_LEN,
            "scheduler_block_size": BLOCK,
            "hash_block_size": BLOCK,
            "log_stats": True,
            **changes,
        },
    )


def new_request(name, tokens, exit_layer, salt=None):
    return Request(
        request_id=str(name),
        prompt_token_ids=list(tokens),
        sampling_params=SamplingParams(max_tokens=50, extra_args=exit_args(exit_layer)),
        pooling_params=None,
        cache_salt=salt,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


@dataclass
class Machine:
    """Runs requests on a manager as scheduler and worker do; raises where one reads wrong KV.

    slots: what each slot of physical memory holds, by (block, place of the layer within its
        segment, offset): (layer, hash of the tokens up to this one). Blocks of all segments lie in
        the same memory.
    """

    manager: DepthKVCacheManager
    slots: dict = field(default_factory=dict)
    running: list = field(default_factory=list)
    reused: int = 0

    def step(self, request, num_tokens):
        """Compute the request's next tokens; False when there are no blocks for them."""
        hit, reuse = 0, None
        if request.status != RequestStatus.RUNNING:
            reuse, hit, _ = self.manager.get_computed_blocks(request)
        num_tokens = min(num_tokens, request.num_tokens - request.num_computed_tokens - hit)
        if self.manager.allocate_slots(request, num_tokens, hit, reuse) is None:
            return False
        self.reused += hit
        if request.status != RequestStatus.RUNNING:
            request.status = RequestStatus.RUNNING
            self.running.append(request)
        start = request.num_computed_tokens + hit
        request.num_computed_tokens = start + num_tokens
        self.slots.update(self._slots_of(request, start, request.num_computed_tokens))
        self._read(request, hit)
        return True

    def leave(self, request, status):
        self.running.remove(request)
        self._read(request, request.num_computed_tokens)
        self.manager.free(request)
        request.status, request.num_computed_tokens = status, 0

    def _slots_of(self, request, start, end):
        exit_layer = request.sampling_params.extra_args["raee_exit_layer"]
        prefixes = list(accumulate(request.all_token_ids[:end], lambda h, t: hash((h, t))))
        for manager in self.manager.segments:
            blocks = manager.req_to_blocks[request.request_id]
            segment = manager.segment
            for position in range(start, end):
                block = blocks[position // BLOCK]
                assert block.is_null is not segment.is_reached(exit_layer)
                for layer in range(segment.first_layer, min(segment.end_layer, exit_layer)):
                    place = (block.block_id, layer - segment.first_layer, position % BLOCK)
                    yield place, (layer, prefixes[position])

    def _read(self, request, end):
        for place, expected in self._slots_of(request, 0, end):
            assert self.slots.get(place) == expected, f"KV read that is not there: {place}"

    def check_references(self):
        """Every block is held exactly as often as requests hold it; all others are free."""
        held = {}
        for manager in self.manager.segments:
            for blocks in manager.req_to_blocks.values():
                for block in blocks:
                    if not block.is_null:
                        held[block.block_id] = held.get(block.block_id, 0) + 1
        pool = self.manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 - len(held)
        for block in pool.blocks[1:]:
            assert block.ref_cnt == held.get(block.block_id, 0)


def run_random_requests(machine, num_requests, rng):
    """Requests come while others run; when blocks are short the last that came is preempted."""
    stems = [[rng.randrange(50) for _ in range(40)] for _ in range(3)]
    waiting = []
    for i in range(num_requests):
        stem = rng.choice(stems)[: rng.choice([0, 8, 24, 40])]
        body = [rng.randrange(50) for _ in range(rng.choice([1, 3, 9, 30]))]
        waiting.append(new_request(i, stem + body, rng.randint(1, NUM_LAYERS)))
    preemptions = 0
    while waiting or machine.running:
        preempted = False
        for request in list(machine.running):
            if request not in machine.running:
                continue
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(rng.randrange(50))
            while not machine.step(request, rng.choice([1, 7, 64])):
                victim = machine.running[-1]
                machine.leave(victim, RequestStatus.PREEMPTED)
                waiting.insert(0, victim)
                preempted, preemptions = True, preemptions + 1
                if victim is request:
                    break
            done = request.num_output_tokens >= 1 + int(request.request_id) % 12
            if request in machine.running and (done or rng.random() < 0.02):
                machine.leave(request, RequestStatus.FINISHED_STOPPED)
        for _ in range(0 if preempted else rng.choice([0, 1, 3])):
            if not waiting or not machine.step(waiting[0], rng.choice([5, 64])):
                break
            waiting.pop(0)
        if rng.random() < 0.05:
            machine.check_references()
    machine.check_references()
    return preemptions


@pytest.mark.parametrize("caching", [True, False])
def test_random_requests_read_what_was_written_and_give_all_back(caching):
    machine = Machine(new_manager(enable_caching=caching))
    preemptions = run_random_requests(machine, NUM_REQUESTS, random.Random(1))
    assert preemptions > NUM_REQUESTS // 100
    assert machine.reused > 4 * NUM_REQUESTS or not caching
    assert machine.manager.usage == 0
    assert not machine.manager._exit_layers
    assert machine.manager.reset_prefix_cache()


@pytest.mark.parametrize(
    "fills_for",
    [
        lambda segment, exit_layer: [segment.index, *range(segment.count, segment.count + 13)],
        lambda segment, exit_layer: [segment.fill(exit_layer - 1), segment.fill(exit_layer)],
    ],
    ids=["any", "one-less"],
)
def test_a_wrong_reuse_is_caught(monkeypatch, fills_for):
    monkeypatch.setattr(Segment, "fills_for", fills_for)
    with pytest.raises(AssertionError, match="KV read that is not there"):
        run_random_requests(Machine(new_manager()), 500, random.Random(1))


def test_a_request_costs_the_segments_it_reaches():
    for exit_layer, segments in [(1, 1), (3, 1), (4, 2), (6, 2), (9, 3), (12, 4)]:
        machine = Machine(new_manager(count=4, num_blocks=101))
        machine.step(new_request("a", range(5 * BLOCK), exit_layer), 64)
        assert machine.manager.usage == pytest.approx(5 * segments / 100)


def test_admission_counts_the_segments_of_the_request():
    def admitted(exit_layer):
        machine = Machine(new_manager(count=4, num_blocks=101))
        tokens = iter(range(10_000))
        prompts = ([next(tokens) for _ in range(5 * BLOCK)] for _ in range(100))
        requests = (new_request(i, p, exit_layer) for i, p in enumerate(prompts))
        return sum(machine.step(r, 64) for r in requests)

    assert [admitted(d) for d in (12, 9, 6, 3)] == [5, 6, 10, 20]


def hits(machine, tokens, exit_layer, salt=None):
    """Tokens that a new request finds in the cache; it is run to its prompt's end."""
    before = machine.reused
    request = new_request(next(NAMES), tokens, exit_layer, salt)
    assert machine.step(request, MAX_LEN)
    machine.leave(request, RequestStatus.FINISHED_STOPPED)
    return machine.reused - before


PROMPT, NAMES = list(range(6 * BLOCK + 1)), count()


def test_what_a_deeper_request_computed_serves_a_shallower_one():
    machine = Machine(new_manager())
    assert hits(machine, PROMPT, 8) == 0
    for exit_layer in (8, 7, 6, 5, 1):
        assert hits(machine, PROMPT, exit_layer) == 6 * BLOCK
    assert hits(machine, PROMPT, 9) == 0
    assert hits(machine, PROMPT, 8) == hits(machine, PROMPT, 9) == 6 * BLOCK


def test_a_deeper_request_finds_what_is_cached_in_all_its_segments():
    machine = Machine(new_manager())
    hits(machine, PROMPT[: 2 * BLOCK], 12)
    hits(machine, PROMPT, 3)
    assert hits(machine, PROMPT, 12) == 2 * BLOCK


def test_a_clients_salt_isolates_at_every_depth():
    machine = Machine(new_manager())
    hits(machine, PROMPT, 12, salt="a")
    assert hits(machine, PROMPT, 6) == hits(machine, PROMPT, 6, salt="b") == 0
    assert hits(machine, PROMPT, 6, salt="a") == 6 * BLOCK


def test_hits_count_alike_whatever_the_depth():
    """A shared beginning, deep requests first: as many hits as at one depth."""

    def hit_rate(depths):
        rng = random.Random(4)
        machine = Machine(new_manager(num_blocks=1000))
        tails = [[rng.randrange(100, 200) for _ in range(2 * BLOCK)] for _ in depths]
        for tail, depth in zip(tails, depths, strict=True):
            hits(machine, PROMPT + tail, depth)
        return machine.reused / (len(depths) * len(PROMPT + tails[0]))

    assert hit_rate(sorted(range(1, 13), reverse=True)) == hit_rate([12] * 12) > 0.5


def test_under_pressure_the_end_of_a_prompt_goes_first_in_all_segments():
    machine = Machine(new_manager(count=4, num_blocks=31))
    hits(machine, PROMPT, 12)  # 24 blocks kept, 2 more of the 4 held at a time are free
    hits(machine, list(range(500, 500 + 3 * BLOCK)), 12)
    assert 2 * BLOCK <= hits(machine, PROMPT, 12) < 6 * BLOCK


def test_events_name_fills_apart():
    manager = new_manager(enable_kv_cache_events=True)
    machine = Machine(manager)
    named = {}
    for exit_layer in (5, 12):
        hits(machine, PROMPT, exit_layer)
        events = manager.take_events()
        named[exit_layer] = [e.group_idx for e in events]
        assert {e.kv_cache_spec_kind for e in events} == {"full_attention"}
    assert named == {5: [0, 4 + 5], 12: [0, 1, 2, 3]}


def test_vllm_groups_layers_by_segment(smollm2, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    config = EngineArgs(model=str(smollm2), **engine_options()).create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"
    groups = get_kv_cache_groups(config, split_by_depth(layer_specs(), NUM_LAYERS, 4))
    names = list(layer_specs())
    assert [g.layer_names for g in groups] == [names[i : i + 3] for i in range(0, 12, 3)]
    assert is_split(KVCacheConfig(1, [], groups))
    vanilla = get_kv_cache_groups(config, split_by_depth(layer_specs(), NUM_LAYERS, 1))
    assert len(vanilla) == 1 and not is_split(KVCacheConfig(1, [], vanilla))


def test_vllms_own_specs_keep_their_managers():
    own = FullAttentionSpec(**SIZES)
    assert KVCacheSpecRegistry.get_manager_class(own) is FullAttentionManager


def test_sliding_windows_are_named_or_leave_the_cache_as_it_is(caplog):
    specs = layer_specs() | {"model.layers.3.attn": SlidingWindowSpec(**SIZES, sliding_window=8)}
    with pytest.raises(UnsupportedError, match=r"4 KV segments: model.layers.3.attn has Sliding"):
        split_by_depth(specs, NUM_LAYERS, 4)
    assert split_by_depth(specs, NUM_LAYERS, "auto") is specs


def test_a_number_of_segments_that_does_not_divide_the_layers_is_named():
    with pytest.raises(UnsupportedError, match="5 KV segments for 12 layers; allowed: 1, 2, 3"):
        split_by_depth(layer_specs(), NUM_LAYERS, 5)
