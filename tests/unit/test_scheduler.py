"""The scheduler is asynchronous where the resolved configuration says so."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from raee_serve.engine import scheduler
from raee_serve.engine.settings import EXIT_HEAD_KEY, EXIT_LAYER_KEY

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("is_async", [False, True])
def test_the_class_follows_the_configuration(is_async, monkeypatch):
    monkeypatch.setattr(scheduler.TruncatingScheduler, "__init__", lambda self, config: None)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=is_async))
    made = scheduler.truncating_scheduler(config)
    assert isinstance(made, scheduler.TruncatingScheduler)
    assert isinstance(made, AsyncScheduler) is is_async


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        (None, 6),
        ({}, 6),
        ({"other": 1}, 6),
        ({EXIT_LAYER_KEY: 1}, 1),
        ({EXIT_LAYER_KEY: 6}, 6),
        ({EXIT_LAYER_KEY: 7}, 6),
        ({EXIT_LAYER_KEY: 0}, 6),
        ({EXIT_LAYER_KEY: True}, 6),
        ({EXIT_LAYER_KEY: "3"}, 6),
        ({EXIT_LAYER_KEY: [3]}, 6),
    ],
)
def test_exit_layer_of_a_request(extra_args, expected):
    assert scheduler.Exits(6).layer_of(asking(extra_args)) == expected


@pytest.mark.parametrize(
    ("layer", "head", "expected"),
    [
        (3, "plain", (3, "plain")),
        (2, "probe", (2, "probe")),
        (6, "probe", (6, "probe")),
        (7, "probe", (6, "plain")),
        (3, "shortcut", (3, "shortcut")),
        (4, "shortcut", (6, "plain")),
        (6, "shortcut", (6, "plain")),
        (3, "fused", (6, "plain")),
        (3, None, (6, "plain")),
        (3, ["shortcut"], (6, "plain")),
    ],
)
def test_exit_head_of_a_request(layer, head, expected):
    request = asking({EXIT_LAYER_KEY: layer, EXIT_HEAD_KEY: head})
    assert scheduler.Exits(6, frozenset({3})).of(request) == expected


def asking(extra_args):
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra_args))


def test_a_pooling_request_has_no_exit():
    assert scheduler.Exits(6).layer_of(SimpleNamespace(sampling_params=None)) == 6
