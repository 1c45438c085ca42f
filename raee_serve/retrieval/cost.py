"""What a batch of look-ups cost: seconds by stage, and how often the encoder was spared."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("encode", "search", "aggregate")


class LookupCost:
    """Filled while one batch is decided.

    seconds: by stage. cache_hits, cache_misses: key texts whose vectors were, and were not,
        remembered.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.cache_hits = self.cache_misses = 0

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Adds the time spent within to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start
