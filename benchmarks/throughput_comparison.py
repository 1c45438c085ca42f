"""The systems of one model, started anew several times, and what they take side by side."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.statistics import Ratio, paired_ratio
from benchmarks.systems import Job, System, run_side_by_side
from benchmarks.throughput_record import RecordError, Round, complete, tell
from benchmarks.workloads import Workload
from raee_serve.checkpoints import local_checkpoint
from raee_serve.cut import cut_checkpoint
from raee_serve.engine.settings import engine_options
from raee_serve.fingerprint import identify_backbone

WARM_UP_LEN = 8
"""Output tokens of a request that warms up: every shape of a step comes up within them."""

Jobs = dict[str, list[tuple[System, Job]]]
"""What runs side by side: the jobs of each name, and whose they are."""


class Comparison:
    """The systems of one model and dtype, asked in turns; each starts when first asked for."""

    def __init__(self, model: str, dtype: str, workdir: Path, kv_segments: Any) -> None:
        self.checkpoint = local_checkpoint(model)
        self.dtype = dtype
        self.num_layers = identify_backbone(self.checkpoint).num_layers
        self.startup_s: dict[str, list[float]] = {}
        """By name of a system, of each of its starts."""
        self._options = engine_options(kv_segments)
        self._workdir = workdir
        self._running: dict[str, System] = {}
        self._seed = 0

    @property
    def ours(self) -> System:
        return self._system("raee-serve", self.checkpoint, self._options)

    def cut(self, depth: int) -> System:
        """Vanilla on the checkpoint cut to `depth` layers; at full depth on the checkpoint."""
        if depth == self.num_layers:
            return self._system("vanilla", self.checkpoint, {})
        path = self._workdir / str(depth)
        if not path.exists():
            cut_checkpoint(self.checkpoint, depth, path)
        return self._system(f"cut to {depth}", path, {})

    def part(
        self, system: System, workload: Workload, exit_layers: list[int] | None = None
    ) -> tuple[System, Job]:
        """A job of `system`, with the prompts of this group."""
        return system, workload.job(self._seed, system.vocab_size, exit_layers)

    def new_prompts(self) -> None:
        """From here on, the same for every system of a group."""
        self._seed += 1

    def close(self) -> None:
        """End all systems; they start anew when they are asked for again."""
        while self._running:
            self._running.popitem()[1].close()

    def _system(self, name: str, path: Path, options: dict[str, Any]) -> System:
        if name not in self._running:
            print(f"starting {name} ...", flush=True)
            system = self._running[name] = System(name, path, self.dtype, options)
            self.startup_s.setdefault(name, []).append(system.startup_s)
        return self._running[name]


@dataclass(frozen=True)
class Times:
    """Of a figure's jobs, [starts * pairs] seconds by name; those of a start stand together."""

    seconds: Mapping[str, Sequence[float]]
    starts: int

    @classmethod
    def of(cls, starts: Sequence[Sequence[Round]], names: Sequence[str], pairs: int) -> Self:
        """Raises `RecordError` where there is no start with so many rounds of these jobs."""
        whole = complete(starts, names, pairs)
        if not whole:
            raise RecordError(f"no start has {pairs} pairs of {', '.join(names)}")
        rounds = [took for start in whole for took in start]
        return cls({name: [took[name] for took in rounds] for name in names}, len(whole))

    def __getitem__(self, name: str) -> Sequence[float]:
        return self.seconds[name]

    def ratio(self, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        return paired_ratio(numerators, denominators, self.starts)

    def counts(self) -> dict[str, int]:
        return {"starts": self.starts, "pairs": len(next(iter(self.seconds.values())))}


def measured_starts(
    comparison: Comparison, groups: Callable[[], Iterable[Jobs]], starts: int, pairs: int
) -> list[list[Round]]:
    """So many rounds of each of the starts of all systems; a shorter round warms up each.

    groups: of a round; the jobs of each run side by side, one group after the other.
    """
    measured: list[list[Round]] = []
    for start in range(1, starts + 1):
        comparison.close()
        one_round(comparison, map(shortened, groups()), start, pair=0)
        rounds = (one_round(comparison, groups(), start, pair + 1) for pair in range(pairs))
        measured.append(list(rounds))
    return measured


def shortened(jobs: Jobs) -> Jobs:
    """The same with at most `WARM_UP_LEN` output tokens each."""

    def short(job: Job) -> Job:
        return {**job, "output_len": min(job["output_len"], WARM_UP_LEN)}

    return {name: [(system, short(job)) for system, job in parts] for name, parts in jobs.items()}


def one_round(comparison: Comparison, groups: Iterable[Jobs], start: int, pair: int) -> Round:
    """Told as it comes; every group has prompts of its own."""
    times: Round = {}
    for jobs in groups:
        seconds = run_side_by_side(jobs)
        comparison.new_prompts()
        tell(start, pair, seconds)
        times |= seconds
    return times
