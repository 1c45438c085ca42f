"""Exit points: the chosen few cost the fewest extra layers, and rounding only ever goes up."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raee_serve.cli import main
from raee_serve.engine import settings
from raee_serve.errors import RaeeError
from raee_serve.exit_points import (
    MAX_POINTS,
    checked_points,
    choose_points,
    even_points,
    extra_layers,
    rounded_up,
    segments_between,
)
from raee_serve.exits.choice import Choice
from raee_serve.retrieval.points_command import points_named
from raee_serve.server.launch import _exit_points
from raee_serve.server.settings import DepthSettings
from tests.unit.exit_tables import new_table, put_labels
from tests.unit.table_rows import entry

pytestmark = pytest.mark.unit

NUM_LAYERS = 8
distributions = st.dictionaries(
    st.integers(1, NUM_LAYERS), st.integers(0, 9).map(float), max_size=NUM_LAYERS
)


@given(distributions, st.integers(1, NUM_LAYERS + 2))
def test_no_other_points_cost_fewer_layers(exits, count):
    chosen = choose_points(exits, NUM_LAYERS, count)
    assert len(chosen) <= count and chosen[-1] == NUM_LAYERS
    others = combinations(range(1, NUM_LAYERS), min(count, NUM_LAYERS) - 1)
    best = min(extra_layers(exits, (*inner, NUM_LAYERS)) for inner in others)
    assert extra_layers(exits, chosen) == pytest.approx(best)


@given(distributions, st.integers(1, NUM_LAYERS))
def test_no_point_is_chosen_that_saves_nothing(exits, count):
    chosen = choose_points(exits, NUM_LAYERS, count)
    for point in chosen[:-1]:
        fewer = tuple(p for p in chosen if p != point)
        assert extra_layers(exits, fewer) > extra_layers(exits, chosen)


@given(st.integers(1, NUM_LAYERS), st.sets(st.integers(1, NUM_LAYERS)))
def test_a_layer_is_rounded_to_the_next_point(layer, inner):
    points = checked_points(sorted(inner) or [NUM_LAYERS], NUM_LAYERS)
    rounded = rounded_up(layer, points)
    assert rounded in points and rounded >= layer
    assert not [p for p in points if layer <= p < rounded]


@given(st.integers(1, 100), st.integers(1, MAX_POINTS))
def test_even_points_end_at_full_depth(num_layers, count):
    points = even_points(num_layers, count)
    assert points == checked_points(points, num_layers)
    assert len(points) <= count


def test_points_of_a_distribution():
    exits = {1: 5.0, 4: 90.0, 5: 1.0, 8: 4.0}
    assert choose_points(exits, NUM_LAYERS, 2) == (4, 8)
    assert extra_layers(exits, (4, 8)) == pytest.approx((5 * 3 + 3) / 100)
    assert choose_points({}, NUM_LAYERS, 3) == (NUM_LAYERS,)


def test_segments_lie_between_points():
    assert segments_between((2, 5, 8)) == ((0, 2), (2, 5), (5, 8))
    assert segments_between((8,)) == ((0, 8),)


@pytest.mark.parametrize("points", [[0], [9], [], [-1, 4]])
def test_points_outside_the_model_are_named(points):
    with pytest.raises(RaeeError, match=r"allowed: layers 1\.\.8"):
        checked_points(points, NUM_LAYERS)


@pytest.mark.parametrize(("exits", "count"), [({0: 1.0}, 2), ({9: 1.0}, 2), ({1: -1.0}, 2)])
def test_bad_distributions_are_named(exits, count):
    with pytest.raises(ValueError, match=r"allowed: layers 1\.\.8, weights >= 0"):
        choose_points(exits, NUM_LAYERS, count)


def test_a_count_below_one_is_named():
    with pytest.raises(ValueError, match="0 exit points; allowed: at least 1"):
        choose_points({}, NUM_LAYERS, 0)


@pytest.fixture
def table(uri):
    """sst2: 20 rows of 4 layers, half of them right at layer 2 alone, the others at layer 3."""
    table = new_table(uri)
    put_labels(table, "sst2", [[0.1, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.1]] * 10)
    table.put_choices({"sst2": Choice(1, 1.0)})
    table.put_task(entry("cr"))  # no rows
    return table


def test_points_of_a_table(table, capsys):
    assert main(["table", "points", table.uri, "--count", "4"]) == 0
    points, extra, _, sst2 = capsys.readouterr().out.splitlines()
    assert set(points.removeprefix("exit points: ").split(",")) <= {"2", "3", "4"}
    assert extra == "extra layers: at least 0.00 of 4, on average"
    name, *free_and_limited = sst2.split()
    assert name == "sst2"
    assert free_and_limited[:2] == free_and_limited[2:], "no exit is between two points"


def test_one_point_is_full_depth(table, capsys):
    assert main(["table", "points", table.uri, "--count", "1"]) == 0
    points, *_, sst2 = capsys.readouterr().out.splitlines()
    assert points == "exit points: 4"
    assert sst2.split()[-1] == "1.00"


def test_a_count_of_none_is_refused(table, capsys):
    assert main(["table", "points", table.uri, "--count", "0"]) == 1
    assert "--count is 0; allowed: at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "settings", "points"),
    [
        (None, {"table": "t"}, ()),
        (None, {"exit_layer": "full"}, ()),
        (None, {"exit_layer": "7"}, (7,)),
        ("any", {"table": "t"}, ()),
        ("4, 9", {"table": "t"}, (4, 9)),
    ],
)
def test_what_a_server_is_asked_for(asked, settings, points):
    assert _exit_points(asked, DepthSettings(**settings)) == points


@pytest.mark.parametrize("on_cuda", [False, True])
def test_on_cuda_the_table_says_which(table, monkeypatch, on_cuda):
    monkeypatch.setattr(settings, "on_cuda", lambda: on_cuda)
    chosen = _exit_points(None, DepthSettings(table=table.uri))
    by_table = points_named("auto", table.uri)
    assert by_table[-1] == 4
    assert chosen == (by_table if on_cuda else ())
    assert _exit_points("auto", DepthSettings(table=table.uri)) == by_table


def test_a_server_that_is_off_opens_no_table(monkeypatch):
    monkeypatch.setenv("RAEE_OFF", "1")
    assert _exit_points("auto", DepthSettings(table="nowhere")) == ()


@pytest.mark.parametrize("asked", ["", "4,", "four", "auto", "-1"])
def test_what_a_server_cannot_do_is_named(asked):
    with pytest.raises(RaeeError, match=r"--exit-points is .*; allowed: layers like 4,8,16"):
        _exit_points(asked, DepthSettings(exit_layer="full"))
