"""RAEE_OFF=1: nothing of ours is in the engine."""

import pytest

from raee_serve.engine import plugin
from raee_serve.engine.settings import engine_options, is_off
from raee_serve.errors import RaeeError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("value", "off"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_it_is_set_by_one(monkeypatch, value, off):
    if value is None:
        monkeypatch.delenv("RAEE_OFF", raising=False)
    else:
        monkeypatch.setenv("RAEE_OFF", value)
    assert is_off() is off
    assert ("worker_cls" in engine_options()) is not off
    assert ("scheduler_cls" in engine_options()) is not off


def test_another_value_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("RAEE_OFF", "yes")
    with pytest.raises(RaeeError, match=r"RAEE_OFF is 'yes'; allowed: 0 or 1"):
        engine_options()


@pytest.mark.parametrize(("value", "registered"), [("0", True), ("1", False)])
def test_models_are_vllms_own(monkeypatch, value, registered):
    from vllm import ModelRegistry

    names = []
    monkeypatch.setenv("RAEE_OFF", value)
    monkeypatch.setattr(ModelRegistry, "register_model", lambda name, _: names.append(name))
    plugin.register()
    assert bool(names) is registered
