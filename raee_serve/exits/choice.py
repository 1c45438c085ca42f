"""How exits of a task are chosen."""

from __future__ import annotations

from dataclasses import dataclass

from raee_serve.errors import RaeeError

DEFAULT_BUDGET = {"labels": 0.98, "free-text": 0.95}
DEFAULT_K = {"labels": 256, "free-text": 24}
PUBLISHED_K = 12
"""Neighbours that the paper's code asks."""


@dataclass(frozen=True, slots=True)
class Choice:
    """k: neighbours whose exit information is read, at least 1. budget: the share of the best
    exit's expected quality that the chosen exit must keep, within (0, 1]."""

    k: int
    budget: float

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RaeeError(f"k = {self.k} is not allowed, it must be at least 1")
        if not 0 < self.budget <= 1:
            raise RaeeError(f"budget {self.budget} is not within (0, 1]")

    @classmethod
    def default(cls, kind: str) -> Choice:
        """kind: of the task, "labels" or "free-text"."""
        return cls(DEFAULT_K[kind], DEFAULT_BUDGET[kind])

    def __str__(self) -> str:
        return f"budget {self.budget:g}, {self.k} neighbours"
