"""Measuring within a time that is set beforehand."""

import time
from collections.abc import Callable


class OutOfTime(Exception):  # noqa: N818 - not an error
    """There is not time enough left for what would come next."""


class Deadline:
    """After which nothing new is begun."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left_s(self) -> float:
        return self._end - self._clock()

    def share(self, of: int) -> "Deadline":
        """One at the end of an equal share of the time that is left."""
        return Deadline(self.left_s / of, self._clock)
