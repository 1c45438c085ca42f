"""Functions that torch leaves to MKL are called before several threads do."""

import os
import subprocess
import sys

import pytest

from raee_serve import vector_math
from raee_serve.errors import CheckpointError
from raee_serve.table.probe import LayerProbe

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


def test_a_probe_settles_them_before_it_loads_its_backbone(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(vector_math, "settle", lambda: called.append(True))
    with pytest.raises(CheckpointError):
        LayerProbe(tmp_path)
    assert called
