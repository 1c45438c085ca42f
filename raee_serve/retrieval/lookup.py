"""A question to a table: what to look up for one prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from raee_serve.records import ExitHead


@dataclass(frozen=True, slots=True)
class Lookup:
    """What to look up for one prompt.

    candidates: names of the tasks it may belong to, one or more; rows of all of them are searched.
    key_text: the text in the template's slot. k, budget: None for the task's own.
    head: "plain" for a label task's LM head and the paper's rule; None for the task's own head.
    min_layer: 1..num_layers; no exit before it is chosen. explain: say why.
    exit_layer: the exit that was asked for, which nothing is to change; None to choose one.
    """

    candidates: tuple[str, ...]
    key_text: str
    k: int | None = None
    head: ExitHead | None = None
    min_layer: int = 1
    explain: bool = False
    budget: float | None = None
    exit_layer: int | None = None

    @property
    def task(self) -> str | None:
        """The one that the prompt belongs to, None where it may belong to several."""
        return self.candidates[0] if len(self.candidates) == 1 else None


def by_candidates(lookups: Sequence[Lookup]) -> dict[tuple[str, ...], list[int]]:
    """Positions of the look-ups that search the same rows."""
    groups = defaultdict(list)
    for i, lookup in enumerate(lookups):
        groups[lookup.candidates].append(i)
    return groups
