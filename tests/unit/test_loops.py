"""Loops are seen as soon as they are long enough, and nothing else is taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raee_serve.server.loops import MAX_PERIOD, MIN_TOKENS, REPEATS, LoopDetector, needed

pytestmark = pytest.mark.unit


def first_loop(tokens):
    """How many tokens the detector has read when it sees a loop; None if it sees none."""
    detector = LoopDetector()
    return next((n for n, token in enumerate(tokens, 1) if detector.add(token)), None)


def ends_in_loop(tokens):
    """The definition, spelled out: the end of the text is some stretch over and over."""
    for period in range(1, MAX_PERIOD + 1):
        end = tokens[-needed(period) :]
        if len(end) == needed(period) and end[period:] == end[:-period]:
            return True
    return False


@given(st.lists(st.integers(0, 2), max_size=120), st.integers(0, 8), st.integers(1, 4))
def test_it_is_the_definition_at_every_token(tokens, start, times):
    tokens = tokens[:start] + tokens[start:] * times
    detector = LoopDetector()
    for length, token in enumerate(tokens, 1):
        assert detector.add(token) == ends_in_loop(tokens[:length])
    assert len(detector) == len(tokens)


@given(
    st.lists(st.integers(0, 999), max_size=50),
    st.lists(st.integers(0, 999), min_size=1, max_size=MAX_PERIOD),
)
def test_whatever_is_repeated_is_seen_in_time(before, stretch):
    text = before + stretch * MIN_TOKENS
    assert first_loop(text) <= len(before) + needed(len(stretch))


@given(st.lists(st.integers(), max_size=300, unique=True))
def test_a_text_that_never_repeats_a_token_has_none(tokens):
    assert first_loop(tokens) is None


@pytest.mark.parametrize("period", [1, 2, 5, 8, MAX_PERIOD])
def test_one_token_less_is_no_loop(period):
    text = [token % period for token in range(needed(period))]
    assert first_loop(text) == needed(period)
    assert first_loop(text[:-1]) is None


def test_a_stretch_that_is_too_long_is_none():
    assert first_loop(list(range(MAX_PERIOD + 1)) * REPEATS) is None


def test_repetitions_that_are_interrupted_are_none():
    assert first_loop(([7] * (MIN_TOKENS - 1) + [8]) * (REPEATS - 1)) is None


def test_what_repeats_a_frame_with_other_words_is_none():
    """A list, a table, a poem's refrain: one token of each stretch is another one."""
    assert first_loop([t for n in range(100) for t in (1, 2, 3, 1000 + n, 4)]) is None
