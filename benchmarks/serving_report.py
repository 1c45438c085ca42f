"""What the runs of `benchmarks.serving` say: medians and ratios, CSV, pictures."""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.serving_shapes import Asked
from benchmarks.serving_systems import Decided
from benchmarks.statistics import Ratio, median_interval, paired_ratio
from raee_serve.evaluation.metrics import metric_name, score
from raee_serve.retrieval.drawing import pyplot
from raee_serve.tasks.task import Task

VANILLA, CUT, OURS = "vanilla", "cut checkpoint", "raee-serve"
SYSTEMS = (VANILLA, CUT, OURS)
SATURATION, LISTS = "saturation", "lists"
"""Loads that have no rate."""
COLORS = {VANILLA: "#6b6b6b", CUT: "#c77d0a", OURS: "#0b6e4f"}
LATENCIES = {"ttft": "time to first token", "tpot": "time per further token", "e2el": "end to end"}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one system.

    load: SATURATION, LISTS, or the request rate as a share of vanilla's at saturation.
    offered_rps: requests a second sent, infinite at saturation; rps: answered, of lists prompts.
    *_ms: percentiles over the run's requests; tpot is 0 for answers of one token.
    mean_exit_layer, reasons: of what the system decided; None and empty for vanilla.
    """

    shape: str
    round: int
    load: str
    system: str
    requests: int
    offered_rps: float
    rps: float
    output_tokens_per_s: float
    p50_ttft_ms: float
    p99_ttft_ms: float
    p50_tpot_ms: float
    p99_tpot_ms: float
    p50_e2el_ms: float
    p99_e2el_ms: float
    mean_exit_layer: float | None
    reasons: Counter[str]

    @classmethod
    def of(
        cls,
        place: tuple[str, int, str, str],
        rate: float,
        result: Mapping[str, Any],
        made: Decided,
        list_of: int = 1,
    ) -> "Run":
        """place: the first four fields; result: vLLM's; made: the decisions of this run.

        list_of: prompts of a request.
        """
        latencies = [f"{p}_{name}_ms" for name in LATENCIES for p in ("p50", "p99")]
        return cls(
            *place,
            requests=result["completed"],
            offered_rps=rate,
            rps=result["request_throughput"] * list_of,
            output_tokens_per_s=result["output_throughput"],
            **{name: float(result[name]) for name in latencies},
            mean_exit_layer=made.layers / made.prompts if made.prompts else None,
            reasons=made.reasons,
        )

    def __str__(self) -> str:
        depth = "" if self.mean_exit_layer is None else f", mean exit {self.mean_exit_layer:.2f}"
        return (
            f"{self.shape} {self.round}  {self.load:10} {self.system:14} {self.rps:8.2f} req/s  "
            f"first token {self.p50_ttft_ms:.0f} / {self.p99_ttft_ms:.0f} ms{depth}"
        )


def write_csv(runs: Sequence[Run], target: Path) -> None:
    """One line a run."""
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Run)])
        writer.writeheader()
        for run in runs:
            reasons = " ".join(f"{reason}={count}" for reason, count in run.reasons.items())
            writer.writerow(asdict(run) | {"reasons": reasons})


@dataclass(frozen=True, slots=True)
class Depths:
    """mean: exit layer of raee-serve's requests at saturation; cut: layers of the cut checkpoint,
    the nearest whole number below full depth."""

    num_layers: int
    cut: int
    mean: float


def summary(
    runs: Sequence[Run],
    num_layers: int,
    cut: int,
    answers: Mapping[str, Sequence[tuple[Asked, str]]],
) -> dict[str, Any]:
    """A shape's figures. cut: layers of the cut checkpoint.

    answers: of each system, those of its runs at saturation.
    """
    full = _at(runs, SATURATION)
    depths = Depths(num_layers, cut, mean(run.mean_exit_layer or num_layers for run in full[OURS]))
    rps = {name: [run.rps for run in full[name]] for name in SYSTEMS}
    loads = list(dict.fromkeys(run.load for run in runs))
    over = [
        over_cut(*rates, depths) for rates in zip(*(rps[name] for name in SYSTEMS), strict=True)
    ]
    return {
        "num_layers": num_layers,
        "mean_exit_layer": round(depths.mean, 3),
        "cut_layers": cut,
        "reasons": dict(sum((run.reasons for run in full[OURS]), Counter[str]())),
        "saturation_rps": {name: round(median(rates), 3) for name, rates in rps.items()},
        "saturation_rps_ratio": paired_ratio(rps[OURS], rps[VANILLA]).as_dict(),
        "cut_rps_ratio": paired_ratio(rps[CUT], rps[VANILLA]).as_dict(),
        "over_cut_checkpoint": median_interval(over).as_dict(),
        "lists_ratio": _lists_ratio(_at(runs, LISTS)),
        "quality": {name: quality(found) for name, found in answers.items()},
        "ttft_p50_added_ms": added_ms(_at(runs, _lowest(loads))).as_dict(),
        "loads": {load: _medians(_at(runs, load)) for load in loads},
    }


def over_cut(vanilla: float, cut: float, ours: float, depths: Depths) -> float:
    """This / a checkpoint cut to the same mean depth, in requests a second.

    The mean depth lies between whole layers: a checkpoint of that depth would take a time a request
    on the line through those of the cut and the whole one.
    """
    saved = (depths.num_layers - depths.mean) / (depths.num_layers - depths.cut)
    return ours * (1 / vanilla - (1 / vanilla - 1 / cut) * saved)


def _lists_ratio(lists: Mapping[str, Sequence[Run]]) -> dict[str, float] | None:
    ours, theirs = ([run.rps for run in lists[name]] for name in (OURS, VANILLA))
    return paired_ratio(ours, theirs).as_dict() if ours else None


def quality(answers: Sequence[tuple[Asked, str]]) -> dict[str, float]:
    """By task, and the mean over tasks: accuracy, or ROUGE-L of free text."""
    by_task: dict[str, list[tuple[Asked, str]]] = {}
    for asked, answer in answers:
        by_task.setdefault(asked.task.name, []).append((asked, answer))
    scores = {
        name: score(found[0][0].task, [a for _, a in found], [asked.gold for asked, _ in found])
        for name, found in by_task.items()
    }
    return {name: round(s, 4) for name, s in {"mean": mean(scores.values()), **scores}.items()}


def added_ms(runs: Mapping[str, Sequence[Run]]) -> Ratio:
    """By how much the median time to the first token is longer than vanilla's, round by round."""
    pairs = zip(runs[OURS], runs[VANILLA], strict=True)
    return median_interval([ours.p50_ttft_ms - theirs.p50_ttft_ms for ours, theirs in pairs])


def headline(shape: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    """The figures for which there are bars, of one shape's summary."""
    metrics = {metric_name(task) for task in tasks}
    return {
        "saturation_rps_ratio": shape["saturation_rps_ratio"]["median"],
        "over_cut_checkpoint": shape["over_cut_checkpoint"]["median"],
        "lists_ratio": (shape["lists_ratio"] or {}).get("median"),
        "accuracy": shape["quality"][OURS]["mean"],
        "vanilla_accuracy": shape["quality"][VANILLA]["mean"],
        "accuracy_is": ", ".join(sorted(metrics)),
        "ttft_p50_added_ms": shape["ttft_p50_added_ms"]["median"],
    }


def draw(runs: Sequence[Run], title: str, target: Path) -> None:
    """One PNG: latencies against the rate offered, p50 solid and p99 dashed, and saturation."""
    plt = pyplot()
    shown = [name for name in LATENCIES if name != "tpot" or any(run.p50_tpot_ms for run in runs)]
    figure, panels = plt.subplots(1, len(shown) + 1, figsize=(4 * len(shown) + 3, 4), dpi=150)
    for axes, latency in zip(panels, shown, strict=False):
        _draw_latency(axes, runs, latency)
    panels[0].legend(frameon=False, fontsize=8)
    rates = {name: [run.rps for run in _at(runs, SATURATION)[name]] for name in SYSTEMS}
    middles = [median(rates[name]) for name in SYSTEMS]
    bars = panels[-1].bar(SYSTEMS, middles, color=[COLORS[name] for name in SYSTEMS])
    panels[-1].bar_label(bars, fmt="%.3g", fontsize=8)
    panels[-1].set_title("requests/s at saturation", fontsize=10)
    panels[-1].tick_params(axis="x", labelsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


def _draw_latency(axes: Any, runs: Sequence[Run], latency: str) -> None:
    loads = rated(dict.fromkeys(run.load for run in runs))
    for name in SYSTEMS:
        for percentile, line in (("p50", "-"), ("p99", "--")):
            found = [_at(runs, load)[name] for load in loads]
            field = f"{percentile}_{latency}_ms"
            axes.plot(
                [median(run.offered_rps for run in own) for own in found],
                [median(getattr(run, field) for run in own) for own in found],
                line,
                color=COLORS[name],
                marker="o",
                label=f"{name}, {percentile}",
            )
    axes.set_title(f"{LATENCIES[latency]} (ms)", fontsize=10)
    axes.set_xlabel("requests/s offered")
    axes.set_yscale("log")


def _at(runs: Sequence[Run], load: str) -> dict[str, list[Run]]:
    """Of each system the runs at one load, in the order of their rounds."""
    return {
        name: [run for run in runs if run.load == load and run.system == name] for name in SYSTEMS
    }


def rated(loads: Iterable[str]) -> list[str]:
    """Those that are request rates."""
    return [load for load in loads if load not in (SATURATION, LISTS)]


def _lowest(loads: Sequence[str]) -> str:
    """The least load; saturation if nothing else was measured."""
    return min(rated(loads), key=float, default=SATURATION)


def _medians(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, float]]:
    """Of each system, the median over rounds of every figure that is a rate or a time."""
    names = [f.name for f in fields(Run) if f.name.endswith(("_ms", "rps", "_per_s"))]
    return {
        system: {
            name: round(median(getattr(run, name) for run in own), 3)
            for name in names
            if name != "offered_rps" or rated([own[0].load])
        }
        for system, own in runs.items()
    }
