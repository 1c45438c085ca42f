"""Truncated execution against vanilla vLLM and against checkpoints physically cut.

All systems live side by side. Those compared work through the same prompts in turns of a fraction
of a second, A B A B; one that waits is stopped (SIGSTOP). A round of all comparisons gives one pair
of times for each figure, which is the median of the pairs' ratios. The first round warms up and is
not counted. All systems are started several times (`--starts`): what memory a process is given
makes it some percent faster or slower for as long as it lives, which no number of pairs evens out.

- full_depth_ratio: this at full depth / vanilla (throughput).
- speedup: this at depth d, or with mixed depths, / vanilla.
- efficiency: this at depth d / vanilla on the checkpoint cut to d layers.
- mixed_efficiency: ideal time / measured time of a batch of mixed depths; the ideal is that of
  `depths.ideal_parts`.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.arguments import add_model_arguments
from benchmarks.depths import DEPTHS, MIXES, depth_named, ideal_parts, mixes
from benchmarks.machine import machine
from benchmarks.statistics import Ratio, paired_ratio
from benchmarks.systems import Job, System, run_side_by_side
from benchmarks.workloads import WORKLOADS, Workload
from raee_serve.checkpoints import local_checkpoint
from raee_serve.cut import cut_checkpoint
from raee_serve.engine.settings import engine_options
from raee_serve.fingerprint import identify_backbone

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
        """This round's job of `system`."""
        return system, workload.job(self._seed, system.vocab_size, exit_layers)

    def next_round(self) -> None:
        """New prompts from here on, the same for every system of the round."""
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
class Rounds:
    """How often all is measured: so many pairs of each of the starts of all systems."""

    starts: int
    pairs: int

    def times(
        self, comparison: Comparison, groups: Callable[[], Iterable[Jobs]]
    ) -> dict[str, list[float]]:
        """[starts * pairs] seconds by name of job; after each start one round warms up.

        groups: of a round; the jobs of each run side by side, one group after the other.
        """
        times: list[dict[str, float]] = []
        for _ in range(self.starts):
            comparison.close()
            for pair in range(self.pairs + 1):
                comparison.next_round()
                own = {k: v for jobs in groups() for k, v in run_side_by_side(jobs).items()}
                times += [own] if pair else []
        return {name: [t[name] for t in times] for name in times[0]}

    def ratio(self, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        return paired_ratio(numerators, denominators, self.starts)


def uniform(
    comparison: Comparison, workload: Workload, depths: Sequence[int], rounds: Rounds
) -> dict[int, dict[str, Ratio]]:
    """Speed-up over vanilla and efficiency against the cut checkpoint, by depth.

    Full depth is always among the depths, for it has vanilla's times.
    """
    full = comparison.num_layers
    depths = sorted({*depths, full})

    def groups() -> Iterable[Jobs]:
        for depth in depths:
            exits = [depth] * workload.num_requests
            yield {
                f"ours {depth}": [comparison.part(comparison.ours, workload, exits)],
                f"cut {depth}": [comparison.part(comparison.cut(depth), workload)],
            }

    times = rounds.times(comparison, groups)
    return {
        depth: {
            "speedup": rounds.ratio(times[f"cut {full}"], times[f"ours {depth}"]),
            "efficiency": rounds.ratio(times[f"cut {depth}"], times[f"ours {depth}"]),
        }
        for depth in depths
    }


def mixed(
    comparison: Comparison, workload: Workload, exits: list[int], rounds: Rounds
) -> dict[str, Ratio]:
    """Speed-up over vanilla, and efficiency against the ideal, of one batch of mixed depths."""
    added, taken_away = ideal_parts(exits)

    def vanilla(depth: int, num_requests: int) -> tuple[System, Job]:
        part = workload.at_most(num_requests)
        return comparison.part(comparison.cut(depth), part)

    def groups() -> Iterable[Jobs]:
        yield {
            "ours": [comparison.part(comparison.ours, workload, exits)],
            "added": [vanilla(*part) for part in added],
            "taken away": [vanilla(*part) for part in taken_away],
            "vanilla": [vanilla(comparison.num_layers, len(exits))],
        }

    times = rounds.times(comparison, groups)
    ideal = [a - b for a, b in zip(times["added"], times["taken away"], strict=True)]
    return {
        "speedup": rounds.ratio(times["vanilla"], times["ours"]),
        "efficiency": rounds.ratio(ideal, times["ours"]),
    }


def measure(args: argparse.Namespace, workdir: Path) -> dict[str, Any]:
    comparison = Comparison(args.model, args.dtype, workdir, args.kv_segments)
    n = comparison.num_layers
    rounds = Rounds(args.starts, -(-args.pairs // args.starts))
    workloads = [WORKLOADS[name].at_most(args.max_requests) for name in args.workloads]
    result: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "num_layers": n,
        "kv_segments": args.kv_segments,
        "starts": rounds.starts,
        "pairs": rounds.starts * rounds.pairs,
        "requests": {w.name: w.num_requests for w in workloads},
        "machine": machine(),
        "full_depth_ratio": {},
        "uniform": {w.name: {} for w in workloads},
        "mixed": {w.name: {} for w in workloads},
        "mixed_efficiency": {w.name: {} for w in workloads},
    }
    try:
        depths = [depth_named(name, n) for name in args.depths]
        for workload in workloads if depths else ():
            add_uniform(result, comparison, workload, depths, rounds)
        for workload in workloads:
            for mix in args.mixes if workload.num_requests > 1 else ():
                add_mixed(result, comparison, workload, mix, rounds)
    finally:
        comparison.close()
    startup_s = comparison.startup_s
    result["startup_ratio"] = round(
        median(startup_s["raee-serve"]) / median(startup_s["vanilla"]), 3
    )
    return result


def add_uniform(
    result: dict[str, Any],
    comparison: Comparison,
    workload: Workload,
    depths: Sequence[int],
    rounds: Rounds,
) -> None:
    """Measure uniform depths and put their figures into the result's fields."""
    for depth, ratios in uniform(comparison, workload, depths, rounds).items():
        if depth == comparison.num_layers:
            report(workload, "full depth / vanilla", ratios["efficiency"])
            result["full_depth_ratio"][workload.name] = ratios["efficiency"].as_dict()
            continue
        for kind, ratio in ratios.items():
            report(workload, f"depth {depth} of {comparison.num_layers}: {kind}", ratio)
        figures = {kind: ratio.as_dict() for kind, ratio in ratios.items()}
        result["uniform"][workload.name][depth] = figures


def add_mixed(
    result: dict[str, Any], comparison: Comparison, workload: Workload, mix: str, rounds: Rounds
) -> None:
    """Measure one mix of depths and put its figures into the result's fields."""
    exits = mixes(comparison.num_layers, workload.num_requests)[mix]
    ratios = mixed(comparison, workload, exits, rounds)
    for kind, ratio in ratios.items():
        report(workload, f"mix {mix}: {kind}", ratio)
    figures: dict[str, Any] = {kind: ratio.as_dict() for kind, ratio in ratios.items()}
    figures["mean_depth"] = sum(exits) / len(exits)
    result["mixed"][workload.name][mix] = figures
    result["mixed_efficiency"][workload.name][mix] = figures["efficiency"]


def report(workload: Workload, what: str, ratio: Ratio) -> None:
    print(f"{workload.name:14} {what:44} {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument(
        "--depths",
        nargs="*",
        default=list(DEPTHS),
        metavar="D",
        help=f"uniform depths: {', '.join(DEPTHS)} or numbers of layers (default: these four); "
        "full depth is measured beside any other",
    )
    parser.add_argument("--pairs", type=int, default=12, help="at least so many (default: 12)")
    parser.add_argument(
        "--starts", type=int, default=3, help="of all systems, of so many pairs each (default: 3)"
    )
    parser.add_argument(
        "--max-requests",
        type=int,
        default=64,
        metavar="N",
        help="of any workload (default: 64). A step takes 2,048 tokens, so that 16 requests of "
        "prefill-heavy are the same steps as 64, only fewer",
    )
    parser.add_argument("--mixes", nargs="*", default=list(MIXES), choices=MIXES)
    parser.add_argument("--kv-segments", default="auto", metavar="N|auto", help="as of `serve`")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as workdir:
        result = measure(args, Path(workdir))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
