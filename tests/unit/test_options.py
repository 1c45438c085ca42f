"""The `raee` object: every bad value is refused by naming it and what is allowed."""

import pytest

from raee_serve.server.options import MAX_K, OptionError, RaeeOptions, parse_options

pytestmark = pytest.mark.unit


def parse(value, tasks=("sst2", "trec"), shortcut_layers=(22, 25)):
    return parse_options(
        value,
        num_layers=30,
        tasks=tasks,
        shortcut_layers=shortcut_layers,
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, RaeeOptions()),
        ({}, RaeeOptions()),
        ({"exit_layer": "auto", "task": None}, RaeeOptions()),
        ({"exit_layer": 1}, RaeeOptions(exit_layer=1)),
        ({"exit_layer": 30}, RaeeOptions(exit_layer=30)),
        ({"exit_layer": "full"}, RaeeOptions(exit_layer=30)),
        ({"exit_layer": 3, "head": "plain"}, RaeeOptions(exit_layer=3, head="plain")),
        ({"head": "probe"}, RaeeOptions(head="probe")),
        ({"exit_layer": 25, "head": "shortcut"}, RaeeOptions(exit_layer=25, head="shortcut")),
        ({"budget": 1, "task": "sst2"}, RaeeOptions(task="sst2", budget=1)),
        ({"task": "trec", "k": MAX_K}, RaeeOptions(task="trec", k=MAX_K)),
    ],
)
def test_good_values(value, expected):
    assert parse(value) == expected


@pytest.mark.parametrize(
    ("value", "parameter", "allowed"),
    [
        (7, "raee", "exit_layer, head, task, k, budget"),
        (["full"], "raee", "exit_layer, head, task, k, budget"),
        ({"depth": 3}, "raee.depth", "exit_layer, head, task, k, budget"),
        ({"exit_layer": 0}, "raee.exit_layer", "1..30, 'full' or 'auto'"),
        ({"exit_layer": 31}, "raee.exit_layer", "1..30"),
        ({"exit_layer": -1}, "raee.exit_layer", "1..30"),
        ({"exit_layer": 10**30}, "raee.exit_layer", "1..30"),
        ({"exit_layer": True}, "raee.exit_layer", "1..30"),
        ({"exit_layer": 12.0}, "raee.exit_layer", "1..30"),
        ({"exit_layer": "12"}, "raee.exit_layer", "1..30"),
        ({"exit_layer": [12]}, "raee.exit_layer", "1..30"),
        ({"task": "sst3"}, "raee.task", "sst2, trec"),
        ({"task": ["sst2"]}, "raee.task", "sst2, trec"),
        ({"k": 0}, "raee.k", f"1..{MAX_K}"),
        ({"k": MAX_K + 1}, "raee.k", f"1..{MAX_K}"),
        ({"k": True}, "raee.k", f"1..{MAX_K}"),
        ({"k": "12"}, "raee.k", f"1..{MAX_K}"),
        ({"rule": "published"}, "raee.rule", "exit_layer, head, task, k, budget"),
        ({"exit_head": "plain"}, "raee.exit_head", "exit_layer, head, task, k, budget"),
        ({"quality": 0.9}, "raee.quality", "exit_layer, head, task, k, budget"),
        ({"head": "fused"}, "raee.head", "plain, shortcut, probe"),
        ({"head": ["plain"]}, "raee.head", "plain, shortcut, probe"),
        ({"head": True}, "raee.head", "plain, shortcut, probe"),
        ({"head": "shortcut"}, "raee.head", "auto; layers that have shortcuts: 22, 25"),
        (
            {"head": "shortcut", "exit_layer": 24},
            "raee.head",
            "is 24; layers that have shortcuts: 22, 25",
        ),
        ({"head": "shortcut", "exit_layer": "full"}, "raee.head", "22, 25"),
        ({"budget": 0}, "raee.budget", "a number above 0 and at most 1"),
        ({"budget": 1.01}, "raee.budget", "a number above 0 and at most 1"),
        ({"budget": float("nan")}, "raee.budget", "a number above 0 and at most 1"),
        ({"budget": "0.9"}, "raee.budget", "a number above 0 and at most 1"),
        ({"budget": True}, "raee.budget", "a number above 0 and at most 1"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(value, parameter, allowed):
    with pytest.raises(OptionError) as caught:
        parse(value)
    assert caught.value.parameter == parameter
    assert allowed in str(caught.value)


def test_without_shortcuts_there_are_none_to_ask_for():
    with pytest.raises(OptionError, match="none on this server"):
        parse({"exit_layer": 25, "head": "shortcut"}, shortcut_layers=())


@pytest.mark.parametrize("field", ["task", "k", "budget"])
def test_without_a_table_only_the_depth_can_be_asked_for(field):
    with pytest.raises(OptionError, match=r"without one.*allowed: exit_layer"):
        parse({field: "sst2"}, tasks=())
    assert parse({"exit_layer": 3}, tasks=()) == RaeeOptions(exit_layer=3)
