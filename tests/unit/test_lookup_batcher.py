"""Look-ups never fail a request and never hold it longer than the time-out."""

import asyncio
import logging
import threading

import pytest

from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.server.lookup import MAX_BATCH, LookupBatcher

pytestmark = pytest.mark.unit

NUM_LAYERS = 30


class Decider:
    """Answers look-up "n" with exit layer n once `gate` is open; notes its batches."""

    def __init__(self, *, open_at_once=True):
        self.batches = []
        self.gate = threading.Event()
        if open_at_once:
            self.gate.set()

    def __call__(self, lookups):
        self.batches.append([lookup.key_text for lookup in lookups])
        assert self.gate.wait(10)
        return [
            ExitDecision(int(lookup.key_text), NUM_LAYERS, Reason.RETRIEVED) for lookup in lookups
        ]


def lookups(*layers):
    return [Lookup(("sst2",), str(layer)) for layer in layers]


def layers_of(decisions):
    return [decision.exit_layer for decision in decisions]


def reasons_of(decisions):
    return [decision.reason for decision in decisions]


def batcher(decide, timeout_s=5.0):
    return LookupBatcher(decide, num_layers=NUM_LAYERS, timeout_s=timeout_s)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_look_ups_that_arrive_meanwhile_share_a_batch():
    decider = Decider(open_at_once=False)

    async def scenario():
        service = batcher(decider)
        first = asyncio.create_task(service.decide(lookups(1)))
        await until(lambda: decider.batches)
        others = [asyncio.create_task(service.decide(lookups(n, n + 1))) for n in (2, 4, 6)]
        await asyncio.sleep(0)
        decider.gate.set()
        return [layers_of(result) for result in await asyncio.gather(first, *others)]

    assert asyncio.run(scenario()) == [[1], [2, 3], [4, 5], [6, 7]]
    assert decider.batches == [["1"], ["2", "3", "4", "5", "6", "7"]]


def test_a_long_list_is_decided_in_batches_and_keeps_its_order():
    decider = Decider()
    wanted = [1 + n % NUM_LAYERS for n in range(2 * MAX_BATCH + 1)]
    decisions = asyncio.run(batcher(decider).decide(lookups(*wanted)))
    assert layers_of(decisions) == wanted
    assert [len(batch) for batch in decider.batches] == [MAX_BATCH, MAX_BATCH, 1]


def test_a_late_look_up_is_full_depth_and_does_not_hold_the_event_loop():
    decider = Decider(open_at_once=False)

    async def scenario():
        service = batcher(decider, timeout_s=0.05)
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticking = asyncio.create_task(tick())
        late = await service.decide(lookups(3))
        waiting_in_vain = await service.decide(lookups(4, 5))
        ticking.cancel()
        decider.gate.set()
        in_time = await service.decide(lookups(6))
        return late + waiting_in_vain + in_time, ticks

    decisions, ticks = asyncio.run(scenario())
    assert reasons_of(decisions) == [Reason.TIMEOUT] * 3 + [Reason.RETRIEVED]
    assert layers_of(decisions) == [NUM_LAYERS] * 3 + [6]
    assert decisions[0].task == "sst2" and decisions[0].lookup_ms > 0
    assert ticks > 5
    assert decider.batches == [["3"], ["6"]]  # 4 and 5 were given up before they were encoded


def test_while_a_batch_hangs_what_was_given_up_is_forgotten():
    decider = Decider(open_at_once=False)

    async def scenario():
        service = batcher(decider, timeout_s=0.01)
        for layer in range(5):
            await service.decide(lookups(layer))
        waiting = len(service._waiting)
        decider.gate.set()
        return waiting

    assert asyncio.run(scenario()) == 0


def test_a_failure_is_full_depth_logged_once_per_kind_and_later_look_ups_work(caplog):
    def decide(lookups):
        if lookups[0].key_text == "1":
            raise RuntimeError("encoder broke")
        if lookups[0].key_text == "2":
            return []
        return Decider()(lookups)

    async def scenario():
        service = batcher(decide)
        return [await service.decide(lookups(n)) for n in (1, 1, 2, 3)]

    with caplog.at_level(logging.ERROR):
        results = asyncio.run(scenario())
    assert [reasons_of(r) for r in results] == [[Reason.ERROR]] * 3 + [[Reason.RETRIEVED]]
    assert len(caplog.records) == 1 and "encoder broke" in caplog.text


def test_what_is_reported_is_the_wait_of_the_request():
    decider = Decider(open_at_once=False)

    async def scenario():
        waiting = asyncio.create_task(batcher(decider).decide(lookups(1)))
        await asyncio.sleep(0.02)
        decider.gate.set()
        return (await waiting)[0].lookup_ms

    assert asyncio.run(scenario()) >= 15  # the decider itself states 0


def test_the_wait_of_each_look_up_for_its_batch_is_told():
    decider, waits = Decider(), []
    service = LookupBatcher(decider, num_layers=NUM_LAYERS, timeout_s=5, observe_wait=waits.append)
    asyncio.run(service.decide(lookups(1, 2)))
    assert len(waits) == 2 and all(wait >= 0 for wait in waits)
    asyncio.run(service.successor(decider).decide(lookups(3)))
    assert len(waits) == 3


def test_a_successor_shares_the_thread():
    first, second = Decider(open_at_once=False), Decider()

    async def scenario():
        old = batcher(first)
        asked = [asyncio.create_task(old.decide(lookups(1)))]
        await until(lambda: first.batches)
        asked.append(asyncio.create_task(old.successor(second).decide(lookups(2))))
        await asyncio.sleep(0.05)
        assert not second.batches  # its turn comes when the other's batch is decided
        first.gate.set()
        assert [layers_of(d) for d in await asyncio.gather(*asked)] == [[1], [2]]
        old.close()

    asyncio.run(scenario())
