"""Depth segments: which layers, who reaches them, whose blocks serve whom."""

from itertools import chain

import pytest

from raee_serve.engine.segments import default_count, parse_count, segments_of

pytestmark = pytest.mark.unit

NUM_LAYERS = 12


@pytest.fixture(params=[1, 2, 3, 4, 6, 12])
def segments(request):
    return segments_of(NUM_LAYERS, request.param)


def test_segments_take_all_layers_in_turn(segments):
    layers = [range(s.first_layer, s.end_layer) for s in segments]
    assert list(chain(*layers)) == list(range(NUM_LAYERS))
    assert len({len(run) for run in layers}) == 1


def test_a_block_serves_those_who_read_no_further_than_it_was_filled(segments):
    for segment in segments:
        reaching = [d for d in range(1, NUM_LAYERS + 1) if segment.is_reached(d)]
        for writer in reaching:
            for reader in reaching:
                serves = segment.fill(writer) in segment.fills_for(reader)
                read = set(range(segment.first_layer, min(reader, segment.end_layer)))
                written = set(range(segment.first_layer, min(writer, segment.end_layer)))
                assert serves is (read <= written)


def test_the_fullest_block_is_looked_for_first():
    first, second = segments_of(12, 2)
    assert first.fills_for(12) == first.fills_for(6) == [0]
    assert second.fills_for(12) == [1]
    assert second.fills_for(10) == [1, second.fill(11), second.fill(10)]


def test_no_two_segments_share_a_fill(segments):
    fills = [{s.fill(d) for d in range(1, NUM_LAYERS + 1) if s.is_reached(d)} for s in segments]
    assert sum(map(len, fills)) == len(set().union(*fills))
    assert [s.fill(NUM_LAYERS) for s in segments] == [s.index for s in segments]


def test_a_shallow_request_reaches_its_share():
    assert [s.is_reached(4) for s in segments_of(12, 3)] == [True, False, False]
    assert [s.is_reached(5) for s in segments_of(12, 3)] == [True, True, False]


@pytest.mark.parametrize("count", [0, -1, 5, 24])
def test_an_uneven_count_names_the_even_ones(count):
    with pytest.raises(ValueError, match=f"{count} KV segments for 12 .*1, 2, 3, 4, 6, 12"):
        segments_of(12, count)


@pytest.mark.parametrize(
    ("num_layers", "count"), [(30, 6), (32, 8), (22, 2), (18, 6), (6, 6), (80, 8), (13, 1), (1, 1)]
)
def test_auto_is_the_most_up_to_eight(num_layers, count):
    assert default_count(num_layers) == count


@pytest.mark.parametrize(("value", "count"), [("auto", "auto"), (1, 1), ("6", 6), (8, 8)])
def test_a_count_as_given(value, count):
    assert parse_count(value) == count


@pytest.mark.parametrize("value", [0, -2, "many", "", None, True, 2.5])
def test_a_count_that_is_none_is_refused_by_value(value):
    with pytest.raises(ValueError, match="allowed: auto or an integer of at least 1"):
        parse_count(value)
