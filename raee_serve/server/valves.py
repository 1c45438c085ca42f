"""Safety valves of a server: how far early exit may go, and how it is watched."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from raee_serve.errors import RaeeError
from raee_serve.records import ExitDecision, Reason
from raee_serve.server.loops import MIN_TOKENS, LoopGuard

LOOP_WINDOW = 32
"""Tokens: twice what the shortest loop takes, and less than a second of decoding."""
MAX_WINDOW = 4096


@dataclass(frozen=True, slots=True)
class Valves:
    """min_layer, min_layers: least exit layer, for all tasks and by task (the greater holds).

    shadow: decide and record, but run everything at full depth.
    sample_full: share (0..1) of the prompts that also run at the other depth afterwards: at full
        depth, or under `shadow` at the one that was decided.
    loop_guard: whether free text that exits early is watched for loops, unless the request says.
    loop_window: tokens that a watched stream is behind; 0: streams are not watched.
    """

    min_layer: int = 1
    min_layers: Mapping[str, int] = field(default_factory=dict)
    shadow: bool = False
    sample_full: float = 0.0
    loop_guard: bool = True
    loop_window: int = LOOP_WINDOW

    def __post_init__(self) -> None:
        if self.loop_window != 0 and not MIN_TOKENS <= self.loop_window <= MAX_WINDOW:
            raise RaeeError(
                f"--loop-window is {self.loop_window}; allowed: {MIN_TOKENS}..{MAX_WINDOW}, "
                "or 0 to leave streams alone"
            )
        if not 0 <= self.sample_full <= 1:
            raise RaeeError(f"--sample-full is {self.sample_full}; allowed: 0..1")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Valves:
        """From `add_arguments`' flags. Raises RaeeError for a bad one."""
        layers = dict(map(_min_layer, args.min_exit_layer))
        everywhere = layers.pop("", 1)
        return cls(
            everywhere,
            layers,
            args.shadow,
            args.sample_full,
            args.loop_guard == "on",
            args.loop_window,
        )

    def check(self, num_layers: int, tasks: Collection[str]) -> None:
        """Raises RaeeError unless the least layers are within the model and the tasks known."""
        for name, layer in {"": self.min_layer, **self.min_layers}.items():
            if not 1 <= layer <= num_layers:
                raise RaeeError(f"--min-exit-layer is {layer}; allowed: 1..{num_layers}")
            if name and name not in tasks:
                raise RaeeError(
                    f"--min-exit-layer names the task {name!r}; "
                    f"the table's: {', '.join(sorted(tasks)) or 'none'}"
                )

    def least_layer(self, tasks: Iterable[str]) -> int:
        """Of a prompt that may belong to any of these tasks."""
        return max([self.min_layer, *(self.min_layers.get(name, 1) for name in tasks)])

    def guard(self, decision: ExitDecision, asked: bool | None, is_free: bool) -> LoopGuard | None:
        """How a prompt's output is watched for loops; None: not at all.

        asked: `raee.loop_guard`. Without it retrieved exits are watched, but not who fixed a depth.
        is_free: whether the output is not limited to a task's labels.
        """
        by_default = self.loop_guard and decision.reason is Reason.RETRIEVED and is_free
        if decision.is_full or self.shadow or not (by_default if asked is None else asked):
            return None
        if decision.head == "probe":  # one label, which is no text that could loop
            return None
        return LoopGuard(self.loop_window, decision.task or "-")

    def __str__(self) -> str:
        least = [str(self.min_layer)] if self.min_layer > 1 else []
        least += [f"{name} {layer}" for name, layer in self.min_layers.items()]
        parts = [
            f"least exit layer {', '.join(least)}" if least else "",
            "shadow: all prompts run at full depth" if self.shadow else "",
            f"{self.sample_full:g} of the prompts run at both depths" if self.sample_full else "",
            "" if self.loop_guard else "no loop guard",
            f"loop window {self.loop_window}" if self.loop_window != LOOP_WINDOW else "",
        ]
        return "; ".join(filter(None, parts)) or "none"


def in_shadow(decision: ExitDecision, alone: str | None = None) -> ExitDecision:
    """At full depth; the reason is SHADOW where something else had been decided.

    alone: the probe that answers there; None for the LM head.
    """
    if decision.is_full and decision.probe in (None, alone):
        return decision
    return replace(
        decision,
        exit_layer=decision.num_layers,
        reason=Reason.SHADOW,
        head="probe" if alone else "plain",
        probe=alone,
        label_scores=(),
        decided_layer=decision.exit_layer,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-exit-layer",
        action="append",
        default=[],
        metavar="[TASK=]N",
        help="least exit layer, of all tasks or of one; repeat for several",
    )
    parser.add_argument(
        "--shadow",
        action="store_true",
        help="decide and record, but run everything at full depth",
    )
    parser.add_argument(
        "--sample-full",
        type=float,
        default=0.0,
        metavar="P",
        help="share of the prompts that also run at full depth after they were answered, to "
        "record how often the answers agree (default: 0)",
    )
    parser.add_argument(
        "--loop-guard",
        choices=["on", "off"],
        default="on",
        help="begin free text again at full depth, once, when its early exit makes it repeat "
        "itself (default: %(default)s; raee.loop_guard overrides it)",
    )
    parser.add_argument(
        "--loop-window",
        type=int,
        default=LOOP_WINDOW,
        metavar="N",
        help="tokens of such a stream that are held back to see whether it loops; 0: streams are "
        "left alone (default: %(default)s)",
    )


def _min_layer(text: str) -> tuple[str, int]:
    """("", N) or (task, N)."""
    task, separator, layer = text.rpartition("=")
    if not layer.isdecimal() or (separator and not task):
        raise RaeeError(f"--min-exit-layer is {text!r}; allowed: N or TASK=N")
    return task, int(layer)
