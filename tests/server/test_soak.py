"""Many connections, some of which leave early: `benchmarks.soak` for seconds instead of minutes."""

import asyncio
import random

import httpx
import pytest

from benchmarks.soak import find_cases, soak, still_held
from tests.server.conftest import MODEL, NUM_LAYERS

pytestmark = pytest.mark.server


def test_nothing_is_lost_crossed_or_kept(served):
    async def run():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, limits=limits, timeout=None) as client:
            cases = await find_cases(client, MODEL, NUM_LAYERS, 10, random.Random(0))
            outcomes = await soak(client, cases, connections=64, seconds=10, abort_share=0.3)
            return cases, outcomes

    cases, outcomes = asyncio.run(run())
    assert outcomes["lost"] == outcomes["crossed"] == 0
    assert outcomes["answered"] > len(cases) and outcomes["aborted"] > 0
    url = f"{served.url}/v1/completions"
    left = still_held(served.url, lambda: httpx.post(url, json=cases[0].body, timeout=60))
    assert not any(left.values()), left
