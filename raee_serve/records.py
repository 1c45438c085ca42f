"""What is decided about one prompt, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from raee_serve.errors import RaeeError
from raee_serve.explanation import Explanation

ExitHead = Literal["plain", "shortcut"]
"""What turns the state after an exit layer into logits: final norm and LM head, or the same after
the layer's shortcut (`shortcuts.py`)."""
EXIT_HEADS: tuple[ExitHead, ...] = ("plain", "shortcut")


class Reason(StrEnum):
    """Why a prompt runs at its exit layer. Only RETRIEVED and OVERRIDE may truncate."""

    RETRIEVED = "retrieved"  # the neighbours' exit information chose the layer
    OVERRIDE = "override"  # the request, or the server's --exit-layer, fixed the layer
    OFF = "off"  # the request, or the server's RAEE_OFF, wants vanilla vLLM
    SHADOW = "shadow"  # an exit was chosen, and --shadow keeps it from being run
    UNMATCHED = "unmatched"  # no known task: neither named nor matched by its prompt
    UNCONSTRAINED = "unconstrained"  # label-word task, output not limited to the label words
    ADAPTER = "adapter"  # the request is for a LoRA adapter, which the table knows nothing of
    FAR = "far"  # nearest rows beyond the task's distance bound
    NO_EXIT = "no-exit"  # no exit keeps the quality asked for on any row: nothing was looked up
    NO_EVIDENCE = "no-evidence"  # no neighbour was answered correctly by any layer
    TIMEOUT = "timeout"  # the look-up took too long
    ERROR = "error"  # the look-up failed


@dataclass(frozen=True, slots=True)
class ExitDecision:
    """How many decoder layers one prompt runs.

    exit_layer: 1..num_layers; num_layers is full depth.
    distance: cosine distance (0..2) to the nearest row looked at, None without a look-up.
    lookup_ms: wall time of the look-up this decision was part of.
    label_bias: what the exit's head adds to the logits of the task's label words, in their order;
        empty for the plain head.
    head: where label words are biased the head that does it, see `retrieval.heads`.
    exit_head: what turns the state after the exit layer into logits; plain at full depth.
    explanation: where one was asked for and a look-up was made.
    decided_layer: the exit layer that was decided where another one is run: under SHADOW, or the
        exit point after it.
    """

    exit_layer: int
    num_layers: int
    reason: Reason
    task: str | None = None
    distance: float | None = None
    lookup_ms: float = 0.0
    label_bias: tuple[float, ...] = ()
    head: str = "plain"
    explanation: Explanation | None = None
    decided_layer: int | None = None
    exit_head: ExitHead = "plain"

    def __post_init__(self) -> None:
        if not 1 <= self.exit_layer <= self.num_layers:
            raise RaeeError(f"exit layer {self.exit_layer} is not within 1..{self.num_layers}")
        if self.is_full and self.exit_head != "plain":
            raise RaeeError(f"full depth has no {self.exit_head} head")

    @classmethod
    def full(
        cls,
        num_layers: int,
        reason: Reason,
        *,
        task: str | None = None,
        distance: float | None = None,
        lookup_ms: float = 0.0,
        explanation: Explanation | None = None,
    ) -> ExitDecision:
        """Full depth, for `reason`."""
        return cls(
            num_layers, num_layers, reason, task, distance, lookup_ms, explanation=explanation
        )

    @property
    def is_full(self) -> bool:
        return self.exit_layer == self.num_layers
