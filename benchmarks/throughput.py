"""Truncated execution against vanilla vLLM and against checkpoints physically cut.

All systems live side by side. Those compared work through the same prompts in turns of a fraction
of a second, A B A B; one that waits is stopped (SIGSTOP). A round of all comparisons gives one pair
of times for each figure, which is the median of the pairs' ratios. The first round, of fewer output
tokens, warms up and is not counted. All systems are started several times (`--starts`): what memory
a process is given makes it some percent faster or slower for as long as it lives, which no number
of pairs evens out.

- full_depth_ratio: this at full depth / vanilla (throughput).
- speedup: this at depth d, or with mixed depths, / vanilla.
- efficiency: this at depth d / vanilla on the checkpoint cut to d layers.
- efficiency of mixed depths: ideal time / measured time; the ideal is that of `depths.ideal_parts`.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.arguments import add_model_arguments
from benchmarks.depths import DEPTHS, MIXES, depth_named, mixes
from benchmarks.machine import machine
from benchmarks.throughput_comparison import Comparison, Jobs, Times, measured_starts
from benchmarks.throughput_figures import Figure, Mixed, Uniform
from benchmarks.throughput_record import RecordError, settings_of, starts_of
from benchmarks.workloads import WORKLOADS, Workload, workload_named


def figures(
    num_layers: int, workloads: Sequence[Workload], depths: Sequence[str], names: Sequence[str]
) -> list[Figure]:
    """Uniform depths of each workload, then the mixes `names` of those with several requests."""
    asked = {depth_named(depth, num_layers) for depth in depths}
    uniform = [Uniform(w, sorted({*asked, num_layers})) for w in workloads if asked]
    mixed = [
        Mixed(w, name, mixes(num_layers, w.num_requests)[name])
        for w in workloads
        for name in names
        if w.num_requests > 1
    ]
    return [*uniform, *mixed]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What is measured, and on what: this machine, or that of the records where nothing runs."""
    where = settings_of(args.records[0])["machine"] if args.starts == 0 else machine()
    return {
        "machine": where,
        "model": args.model,
        "dtype": args.dtype,
        "kv_segments": args.kv_segments,
        "requests": {w.name: w.num_requests for w in args.workloads},
    }


def measure(args: argparse.Namespace, about: dict[str, Any], workdir: Path) -> dict[str, Any]:
    recorded = [start for path in args.records for start in starts_of(path, about)]
    comparison = Comparison(args.model, args.dtype, workdir, args.kv_segments)
    measured = figures(comparison.num_layers, args.workloads, args.depths, args.mixes)

    def groups() -> Iterable[Jobs]:
        return (jobs for each in measured for jobs in each.groups(comparison))

    pairs = -(-args.pairs // max(args.starts, 1))
    try:
        starts = recorded + measured_starts(comparison, groups, args.starts, pairs)
    finally:
        comparison.close()
    result: dict[str, Any] = {
        **about,
        "num_layers": comparison.num_layers,
        "full_depth_ratio": {},
        "uniform": {},
        "mixed": {},
    }
    for each in measured:
        each.put_into(result, Times.of(starts, each.names, pairs))
    if startup_s := comparison.startup_s:
        ratio = median(startup_s["raee-serve"]) / median(startup_s["vanilla"])
        result["startup_ratio"] = round(ratio, 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument(
        "--workloads",
        nargs="+",
        type=workload_named,
        default=list(WORKLOADS.values()),
        metavar="NAME[:N]",
        help=f"{', '.join(WORKLOADS)} (default: all); N of its requests at most. A step takes "
        "2,048 tokens, so that prefill-heavy:8 are the same steps as all 64, only fewer",
    )
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
        "--starts",
        type=int,
        default=3,
        help="of all systems, which share the pairs (default: 3); 0 with --records alone, of "
        "whose starts each gives --pairs",
    )
    parser.add_argument(
        "--records",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="what other runs have printed, with the same settings; their starts count, too, if "
        "they have as many pairs as a start has here",
    )
    parser.add_argument("--mixes", nargs="*", default=list(MIXES), choices=MIXES)
    parser.add_argument("--kv-segments", default="auto", metavar="N|auto", help="as of `serve`")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    if args.starts < (0 if args.records else 1):
        parser.error(f"--starts is {args.starts}; allowed: at least 1, or 0 with --records")
    if args.pairs < 1:
        parser.error(f"--pairs is {args.pairs}; allowed: at least 1")
    try:
        about = settings(args)
        print(json.dumps(about), flush=True)
        with tempfile.TemporaryDirectory() as workdir:
            result = measure(args, about, Path(workdir))
    except RecordError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
