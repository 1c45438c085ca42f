"""Whether a text has fallen into a loop: an n-gram test on its own tokens. Imports no vLLM, so that
settings can be checked early."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

MAX_PERIOD = 64
"""Longest stretch of tokens whose repetition is looked for: two or three sentences."""
REPEATS = 3
"""Times that the stretch has to stand there, one after the other."""
MIN_TOKENS = 16
"""Least length of all of them together: a row of dashes, or "no, no, no", is no loop."""


@dataclass(frozen=True, slots=True)
class LoopGuard:
    """How one prompt's output is watched.

    window: tokens of a stream that are held back; 0: streams are not watched.
    task: that a restart counts for.
    """

    window: int
    task: str


class LoopDetector:
    """Reads one completion's tokens as they come.

    A token costs as many steps as it has occurred among the last MAX_PERIOD tokens: few, before a
    loop is found.
    """

    def __init__(self) -> None:
        self._length = 0
        self._places: dict[int, deque[int]] = defaultdict(deque)
        """By token: where it stands among the last MAX_PERIOD tokens, earliest first."""
        self._runs: dict[int, int] = {}
        """By period: how many tokens up to here equal the one that many places before them."""

    def __len__(self) -> int:
        """Tokens read so far."""
        return self._length

    def add(self, token: int) -> bool:
        """Whether the text ends in a loop, now that it ends in `token`."""
        places = self._places[token]
        while places and self._length - places[0] > MAX_PERIOD:
            places.popleft()
        periods = [self._length - place for place in places]
        self._runs = {period: self._runs.get(period, 0) + 1 for period in periods}
        places.append(self._length)
        self._length += 1
        return any(period + run >= needed(period) for period, run in self._runs.items())

    def add_all(self, tokens: Iterable[int]) -> bool:
        """Whether the text ends in a loop after one of `tokens`; the others are not read then."""
        return any(map(self.add, tokens))


def needed(period: int) -> int:
    """Tokens that a stretch of `period` tokens and its repetitions have to cover."""
    return max(MIN_TOKENS, REPEATS * period)
