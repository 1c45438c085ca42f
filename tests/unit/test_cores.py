"""Look-ups run where no engine worker does."""

import asyncio
import os
from types import SimpleNamespace

import pytest
from vllm.platforms import current_platform

from raee_serve.engine.settings import RESTING_EXECUTOR
from raee_serve.server import cores
from raee_serve.server.lookup import LookupBatcher

CORES = sorted(os.sched_getaffinity(0))


def config(**changes):
    settings = {
        "distributed_executor_backend": "mp",
        "data_parallel_size": 1,
        "local_world_size": 1,
        "data_parallel_rank_local": None,
        "_api_process_count": 1,
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{**settings, **changes}), kv_transfer_config=None
    )


pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="workers are bound on CPUs"),
    pytest.mark.skipif(len(CORES) < 2, reason="needs two cores"),
]


@pytest.mark.parametrize("executor", ["mp", RESTING_EXECUTOR])
def test_cores_that_vllm_reserves_are_spare(monkeypatch, executor):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
    spare = cores.spare_cores(config(distributed_executor_backend=executor))
    assert len(spare) == 1 and spare < set(CORES)


def test_none_are_spare_where_workers_have_all_or_nothing_is_known(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    assert cores.spare_cores(config()) == frozenset()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    assert cores.spare_cores(config()) == frozenset()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(CORES[0]))
    assert cores.spare_cores(config(data_parallel_size=2)) == frozenset()
    assert cores.spare_cores(config(distributed_executor_backend="uni")) == frozenset()


def test_cores_that_the_user_did_not_bind_are_spare(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(CORES[0]))
    assert cores.spare_cores(config()) == set(CORES[1:])


def test_look_ups_keep_to_the_cores_they_are_given_and_nothing_else_does():
    seen = []

    def decide(lookups):
        seen.append(os.sched_getaffinity(0))
        return [SimpleNamespace() for _ in lookups]

    async def scenario():
        service = LookupBatcher(decide, num_layers=4, timeout_s=5)
        service.keep_to({CORES[-1]})
        await service._decided([SimpleNamespace(lookup=None, since=0.0)])
        service.close()

    asyncio.run(scenario())
    assert seen == [{CORES[-1]}] and os.sched_getaffinity(0) == set(CORES)
