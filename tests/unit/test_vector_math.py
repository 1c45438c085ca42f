"""Functions that torch leaves to MKL are called before several threads do."""

import os
import subprocess
import sys

import pytest
import torch

from raee_serve import vector_math

pytestmark = pytest.mark.unit

CHILD = """
import torch
from raee_serve import vector_math
from raee_serve.engine import plugin
called = []
record = lambda function: lambda x: (called.append((function.__name__, x.dtype)), function(x))
vector_math.FUNCTIONS = tuple(map(record, vector_math.FUNCTIONS))
plugin.register()
print("CALLED", len(set(called)))
"""


@pytest.mark.parametrize(("off", "calls"), [("0", 2 * len(vector_math.FUNCTIONS)), ("1", 0)])
def test_the_plugin_settles_them_unless_it_is_off(off, calls):
    """In a process of its own, as vLLM calls it in each."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "RAEE_OFF": off},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"CALLED {calls}\n" in done.stdout


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_all_threads_are_as_accurate_as_one(name):
    """Of a table like rotary embeddings'; the fault that is prevented errs by 1e-4 there."""
    vector_math.settle()
    angles = torch.outer(torch.arange(2048.0), 1e4 ** (-torch.arange(32) / 32))
    function = getattr(torch, name)
    torch.testing.assert_close(
        function(angles), function(angles.double()).float(), rtol=0, atol=1e-6
    )
