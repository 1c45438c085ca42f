"""Probes are in the workers before anything is decided by them, and as long as a request needs."""

import asyncio

import pytest

from raee_serve.errors import RaeeError
from raee_serve.retrieval.retriever import ProbeSet
from raee_serve.server.probe_sets import ProbeSets

pytestmark = pytest.mark.unit

A, B = ProbeSet("a", b"A"), ProbeSet("b", b"B")


class Workers:
    """Hold sets as the engine's do. error: of the next load."""

    def __init__(self):
        self.held, self.calls, self.error = {}, [], None

    async def call(self, method, args):
        await asyncio.sleep(0)
        self.calls.append((method, args[0]))
        if method == "load_probes":
            if self.error:
                raise self.error
            self.held[args[0]] = args[1]
        else:
            del self.held[args[0]]


async def settled():
    for _ in range(10):
        await asyncio.sleep(0)


def test_an_old_set_goes_with_the_last_of_its_requests():
    async def scenario():
        workers, sets = Workers(), ProbeSets()
        await sets.connect(workers.call, A)
        assert workers.held == {"a": b"A"}
        with sets.in_use("a"):
            with sets.in_use("a"):
                await sets.load(B)
                await settled()
            await settled()
            assert set(workers.held) == {"a", "b"}
        await settled()
        assert set(workers.held) == {"b"}
        await sets.load(None)  # a table without probes
        await settled()
        assert workers.held == {}

    asyncio.run(scenario())


def test_a_set_that_comes_back_is_not_loaded_again():
    async def scenario():
        workers, sets = Workers(), ProbeSets()
        await sets.connect(workers.call, A)
        with sets.in_use("a"):
            await sets.load(B)
            await sets.load(A)
        await settled()
        assert workers.calls == [("load_probes", "a"), ("load_probes", "b"), ("unload_probes", "b")]
        await sets.load(A)
        assert len(workers.calls) == 3 and set(workers.held) == {"a"}

    asyncio.run(scenario())


def test_a_set_comes_back_while_it_is_unloaded():
    async def scenario():
        workers, sets = Workers(), ProbeSets()
        await sets.connect(workers.call, A)
        for _ in range(5):
            await asyncio.gather(sets.load(B), sets.load(A))
            await settled()
        assert set(workers.held) == {"a"}

    asyncio.run(scenario())


def test_what_cannot_be_loaded_leaves_the_current_one(caplog):
    async def scenario():
        workers, sets = Workers(), ProbeSets()
        await sets.connect(workers.call, A)
        workers.error = RuntimeError("probe 'sst2/3' has 3 labels")
        with pytest.raises(RaeeError, match="cannot load the table's probes: probe 'sst2/3' has"):
            await sets.load(B)
        with sets.in_use("a"):
            pass
        await settled()
        assert set(workers.held) == {"a"} and "set b" in caplog.text
        workers.error = None
        await sets.load(B)
        await settled()
        assert set(workers.held) == {"b"}

    asyncio.run(scenario())


def test_without_an_engine_there_is_nothing_to_do():
    async def scenario():
        sets = ProbeSets()
        await sets.load(A)
        with sets.in_use("a"):
            pass

    asyncio.run(scenario())
