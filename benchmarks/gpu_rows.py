"""What `benchmarks.gpu` measures of a shape, and how, the most important first."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.deadline import OutOfTime
from benchmarks.depths import DEPTHS, depth_named, ideal_parts, mixes, six_depths
from benchmarks.fleet import Fleet
from benchmarks.statistics import Ratio, paired_ratio
from benchmarks.workloads import WORKLOADS, Workload

TABLE = "table"
"""The mix that is drawn from the exits of a table's rows."""
ORDER = ("full", "half", "half-shallow", "third", "two-thirds", TABLE, "six-depths")
BARS = {"full": 0.99, "half": 0.95, "half-shallow": 0.9, TABLE: 0.9, "six-depths": 0.9}
"""Of the efficiency, met where the lower end of its interval is as high."""
MIN_PAIRS = 5
"""With fewer a row counts as not measured."""

OURS = "ours"
Part = tuple[int, int]
"""Vanilla on the shape cut to so many layers, with so many requests."""
Key = Part | str
"""A part, or OURS."""


@dataclass(frozen=True, slots=True)
class Row:
    """depths: name of its mix of depths. exits: [num_requests] exit layers."""

    workload: Workload
    depths: str
    exits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """speedup: over vanilla at full depth. efficiency: the ideal's time / the time taken.

    vanilla_s: seconds that vanilla took, their median.
    """

    pairs: int
    speedup: Ratio
    efficiency: Ratio
    vanilla_s: float


def told(row: Row, measured: Measured | None) -> dict[str, Any]:
    """As JSON holds it; None if it could not be measured."""
    bar = BARS.get(row.depths)
    about: dict[str, Any] = {
        "workload": row.workload.name,
        "depths": row.depths,
        "mean_depth": round(sum(row.exits) / len(row.exits), 2),
        "bar": bar,
        "measured": measured is not None,
    }
    if measured is None:
        return about
    return about | {
        "pairs": measured.pairs,
        "speedup": measured.speedup.as_dict(),
        "efficiency": measured.efficiency.as_dict(),
        "vanilla_s": round(measured.vanilla_s, 4),
        "met": None if bar is None else measured.efficiency.low >= bar,
    }


HEADINGS = f"{'workload':14} {'depths':13} {'mean':>5}  {'speed-up':20} {'efficiency':20} bar"


def as_line(row: Row, measured: Measured | None) -> str:
    """Of the table under HEADINGS."""
    what = told(row, measured)
    start = f"{what['workload']:14} {what['depths']:13} {what['mean_depth']:5.1f}  "
    if measured is None:
        return start + "not measured"
    figures = f"{measured.speedup!s:20} {measured.efficiency!s:20} "
    if what["bar"] is None:
        return start + figures + "-"
    return start + figures + f"{what['bar']:.2f} {'met' if what['met'] else 'missed'}"


def rows(num_layers: int, table: Sequence[float] | None = None) -> list[Row]:
    """table: share of a table's rows that exit at each of its backbone's layers, first to last."""
    found = []
    for depths in ORDER:
        for workload in WORKLOADS.values():
            exits = _exits(depths, num_layers, workload.num_requests, table)
            if exits and (depths in DEPTHS or workload.num_requests > 1):
                found.append(Row(workload, depths, tuple(exits)))
    return found


def _exits(
    depths: str, num_layers: int, num_requests: int, table: Sequence[float] | None
) -> list[int]:
    """[num_requests] exit layers; none where there is no table to draw them from."""
    if depths in DEPTHS:
        return [depth_named(depths, num_layers)] * num_requests
    if depths == TABLE:
        return drawn(table, num_layers, num_requests) if table else []
    return mixes(num_layers, num_requests)[depths]


def drawn(table: Sequence[float], num_layers: int, num_requests: int) -> list[int]:
    """Exit layers as often as a table's rows have them, at the same share of the layers.

    Each becomes the next of six depths that is as deep, for the ideal of a mix needs an engine for
    each depth. Seeded, the same in every run.
    """
    six = six_depths(num_layers)
    scale = num_layers / len(table)
    own = [round(layer * scale, 6) for layer in range(1, len(table) + 1)]
    layers = [next(d for d in six if d >= layer) for layer in own]
    return random.Random(0).choices(layers, weights=table, k=num_requests)


def measure(fleet: Fleet, row: Row, pairs: int) -> Measured:
    """Raises `OutOfTime` where there is no time for it, `EngineError` for an engine that failed.

    All times are shares of what vanilla takes at full depth in the same round, for not all engines
    that an ideal asks for may have room beside each other.
    """
    added, taken_away = ideal_parts(row.exits)
    whole: Part = (fleet.shape.num_layers, len(row.exits))
    missing = {*added, *taken_away}
    shares: dict[Key, list[float]] = {}
    while missing:
        fleet.bring(sorted({d for d, _ in missing}, key=lambda d: (d not in fleet.depths, d)))
        here = {part for part in missing if part[0] in fleet.depths}
        missing -= here
        runs = [whole, *sorted(here - {whole}), *([] if missing else [OURS])]
        seconds = rounds(runs, lambda key, seed: run(fleet, row, key, seed), pairs, fleet)
        for key, times in seconds.items():
            shares[key] = [t / v for t, v in zip(times, seconds[whole], strict=True)]
    n = min(map(len, shares.values()))
    ideal = [
        sum(shares[part][i] for part in added) - sum(shares[part][i] for part in taken_away)
        for i in range(n)
    ]
    ours = shares[OURS][:n]
    return Measured(
        n, paired_ratio([1.0] * n, ours), paired_ratio(ideal, ours), median(seconds[whole])
    )


def run(fleet: Fleet, row: Row, key: Key, seed: int) -> float:
    """Seconds of one run of what the key names."""
    vocab_size = fleet.shape.config["vocab_size"]
    if key == OURS:
        return fleet.our_seconds(row.workload.job(seed, vocab_size, list(row.exits)))
    depth, num_requests = key
    return fleet.seconds(depth, row.workload.at_most(num_requests).job(seed, vocab_size))


def rounds(
    runs: Sequence[Key], run_once: Callable[[Key, int], float], pairs: int, fleet: Fleet
) -> dict[Key, list[float]]:
    """Seconds by key of up to `pairs` rounds, as there is time, after one to warm up.

    In each round all run once, in turns A B .. B A .., with new prompts that they share.
    """
    times: dict[Key, list[float]] = {key: [] for key in runs}
    for number in range(pairs + 1):
        if fleet.deadline.left_s <= 0:
            break
        seed = next(fleet.seeds)
        for key in runs if number % 2 else reversed(runs):
            seconds = run_once(key, seed)
            if number > 0:
                times[key].append(seconds)
    if len(times[runs[0]]) < min(MIN_PAIRS, pairs):
        raise OutOfTime
    return times
