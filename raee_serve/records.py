"""What is decided about one prompt, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from raee_serve.errors import RaeeError
from raee_serve.explanation import Explanation

ExitHead = Literal["plain", "shortcut", "probe"]
"""What turns the state after an exit layer into an answer: final norm and LM head, the same after
the layer's shortcut (`shortcuts.py`), or final norm and a probe (`exits/probes.py`)."""
EXIT_HEADS: tuple[ExitHead, ...] = ("plain", "shortcut")
"""The heads of free text."""


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
    """How many decoder layers one prompt runs, and what answers then.

    exit_layer: 1..num_layers; num_layers is full depth.
    distance: cosine distance (0..2) to the nearest row looked at, None without a look-up.
    lookup_ms: wall time of the look-up this decision was part of.
    head: what turns the state after the exit layer into an answer; never a shortcut at full depth.
    probe: name of the probe, where the head is one. label_scores: what is added to its scores, in
        the order of the task's labels; empty for nothing.
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
    head: ExitHead = "plain"
    probe: str | None = None
    label_scores: tuple[float, ...] = ()
    explanation: Explanation | None = None
    decided_layer: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.exit_layer <= self.num_layers:
            raise RaeeError(f"exit layer {self.exit_layer} is not within 1..{self.num_layers}")
        if self.is_full and self.head == "shortcut":
            raise RaeeError("full depth has no shortcut head")
        assert (self.probe is not None) == (self.head == "probe"), (self.head, self.probe)

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
        """Full depth through the plain head, for `reason`."""
        return cls(
            num_layers, num_layers, reason, task, distance, lookup_ms, explanation=explanation
        )

    @property
    def is_full(self) -> bool:
        return self.exit_layer == self.num_layers
