"""What `benchmarks.throughput` measures of a workload: uniform depths, and mixes of depths."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.depths import ideal_parts
from benchmarks.statistics import Ratio
from benchmarks.systems import Job, System
from benchmarks.throughput_comparison import Comparison, Jobs, Times
from benchmarks.workloads import Workload


class Figure(Protocol):
    """Something to measure: what has to run in each round, and what the times of it say.

    names: of its jobs.
    """

    @property
    def names(self) -> Sequence[str]: ...

    def groups(self, comparison: Comparison) -> Iterable[Jobs]: ...

    def put_into(self, result: dict[str, Any], times: Times) -> None: ...


@dataclass(frozen=True)
class Uniform:
    """All requests at one depth, for each of `depths`, against the checkpoint cut to it."""

    workload: Workload
    depths: Sequence[int]
    """Full depth among them, for it has vanilla's times."""

    @property
    def names(self) -> list[str]:
        return [self._job(of, depth) for depth in self.depths for of in ("ours", "cut")]

    def groups(self, comparison: Comparison) -> Iterable[Jobs]:
        for depth in self.depths:
            exits = [depth] * self.workload.num_requests
            yield {
                self._job("ours", depth): [comparison.part(comparison.ours, self.workload, exits)],
                self._job("cut", depth): [comparison.part(comparison.cut(depth), self.workload)],
            }

    def put_into(self, result: dict[str, Any], times: Times) -> None:
        """`speedup` over vanilla and `efficiency` against the cut checkpoint, by depth."""
        name, full = self.workload.name, max(self.depths)
        vanilla = times[self._job("cut", full)]
        for depth in self.depths:
            ours = times[self._job("ours", depth)]
            efficiency = times.ratio(times[self._job("cut", depth)], ours)
            if depth == full:
                report(name, "full depth / vanilla", efficiency)
                result["full_depth_ratio"][name] = efficiency.as_dict() | times.counts()
                continue
            ratios = {"speedup": times.ratio(vanilla, ours), "efficiency": efficiency}
            found = reported(name, f"depth {depth} of {full}", ratios)
            result["uniform"].setdefault(name, {})[depth] = {**found, **times.counts()}

    def _job(self, of: str, depth: int) -> str:
        return f"{self.workload.name}, {of}, {depth}"


@dataclass(frozen=True)
class Mixed:
    """One batch of mixed depths, against `depths.ideal_parts`."""

    workload: Workload
    mix: str
    exits: Sequence[int]
    """[num_requests] exit layers."""

    @property
    def names(self) -> list[str]:
        return [self._job(of) for of in ("ours", "added", "taken away", "vanilla")]

    def groups(self, comparison: Comparison) -> Iterable[Jobs]:
        added, taken_away = ideal_parts(self.exits)

        def vanilla(depth: int, num_requests: int) -> tuple[System, Job]:
            return comparison.part(comparison.cut(depth), self.workload.at_most(num_requests))

        yield {
            self._job("ours"): [comparison.part(comparison.ours, self.workload, list(self.exits))],
            self._job("added"): [vanilla(*part) for part in added],
            self._job("taken away"): [vanilla(*part) for part in taken_away],
            self._job("vanilla"): [vanilla(comparison.num_layers, len(self.exits))],
        }

    def put_into(self, result: dict[str, Any], times: Times) -> None:
        """`speedup` over vanilla and `efficiency` against the ideal."""
        name, ours = self.workload.name, times[self._job("ours")]
        parts = zip(times[self._job("added")], times[self._job("taken away")], strict=True)
        ratios = {
            "speedup": times.ratio(times[self._job("vanilla")], ours),
            "efficiency": times.ratio([added - taken for added, taken in parts], ours),
        }
        result["mixed"].setdefault(name, {})[self.mix] = {
            **reported(name, f"mix {self.mix}", ratios),
            **times.counts(),
            "mean_depth": sum(self.exits) / len(self.exits),
        }

    def _job(self, of: str) -> str:
        return f"{self.workload.name}, {self.mix}, {of}"


def reported(workload: str, what: str, ratios: Mapping[str, Ratio]) -> dict[str, dict[str, float]]:
    """The ratios by kind as JSON has them, each told in a line."""
    for kind, ratio in ratios.items():
        report(workload, f"{what}: {kind}", ratio)
    return {kind: ratio.as_dict() for kind, ratio in ratios.items()}


def report(workload: str, what: str, ratio: Ratio) -> None:
    print(f"{workload:14} {what:44} {ratio}", flush=True)
