"""The `raee` object: every bad value is refused by naming it and what is allowed."""

import pytest

from raee_serve.server.options import MAX_K, OptionError, RaeeOptions, parse_options

pytestmark = pytest.mark.unit


def parse(value, tasks=("sst2", "trec")):
    return parse_options(value, num_layers=30, tasks=tasks, rules=("earliest", "published"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, RaeeOptions()),
        ({}, RaeeOptions()),
        ({"exit_layer": "auto", "task": None}, RaeeOptions()),
        ({"exit_layer": 1}, RaeeOptions(exit_layer=1)),
        ({"exit_layer": 30}, RaeeOptions(exit_layer=30)),
        ({"exit_layer": "full"}, RaeeOptions(exit_layer=30)),
        (
            {"task": "trec", "k": MAX_K, "rule": "published"},
            RaeeOptions(task="trec", k=MAX_K, rule="published"),
        ),
    ],
)
def test_good_values(value, expected):
    assert parse(value) == expected


@pytest.mark.parametrize(
    ("value", "parameter", "allowed"),
    [
        (7, "raee", "exit_layer, task, k, rule"),
        (["full"], "raee", "exit_layer, task, k, rule"),
        ({"depth": 3}, "raee.depth", "exit_layer, task, k, rule"),
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
        ({"rule": "latest"}, "raee.rule", "earliest, published"),
        ({"rule": {}}, "raee.rule", "earliest, published"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(value, parameter, allowed):
    with pytest.raises(OptionError) as caught:
        parse(value)
    assert caught.value.parameter == parameter
    assert allowed in str(caught.value)


@pytest.mark.parametrize("field", ["task", "k", "rule"])
def test_without_a_table_only_the_depth_can_be_asked_for(field):
    with pytest.raises(OptionError, match=r"without one.*allowed: exit_layer"):
        parse({field: "sst2"}, tasks=())
    assert parse({"exit_layer": 3}, tasks=()) == RaeeOptions(exit_layer=3)
