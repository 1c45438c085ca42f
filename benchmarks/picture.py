"""What `benchmarks.throughput --json` printed: a table of all, and a picture of one workload."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from raee_serve.evaluation.report import markdown_table
from raee_serve.retrieval.drawing import pyplot

INK, OURS, IDEAL, VANILLA = "#222222", "#0b6e4f", "#c77d0a", "#6b6b6b"


def draw(result: dict[str, Any], workload: str, target: Path) -> None:
    """One PNG: this, the ideal and vanilla, at uniform depths and mixes of one workload."""
    n = result["num_layers"]
    full = result["full_depth_ratio"][workload]
    uniform = sorted((int(d), r) for d, r in result["uniform"][workload].items())
    depths = [d / n for d, _ in uniform] + [1.0]
    speed = [r["speedup"] for _, r in uniform] + [full]
    ideal = [r["speedup"]["median"] / r["efficiency"]["median"] for _, r in uniform] + [1.0]

    figure, axes = pyplot().subplots(figsize=(7, 4), dpi=150)
    axes.axhline(1.0, color=VANILLA, linestyle=":", label="vanilla vLLM")
    axes.plot(depths, ideal, color=IDEAL, marker="s", label="ideal: checkpoint cut to that depth")
    axes.errorbar(
        depths,
        [s["median"] for s in speed],
        yerr=bars(speed),
        color=OURS,
        marker="o",
        capsize=3,
        label="raee-serve, all requests at one depth",
    )
    for place, (mix, figures) in enumerate(result["mixed"].get(workload, {}).items()):
        x, y = figures["mean_depth"] / n, figures["speedup"]
        axes.errorbar([x], [y["median"]], yerr=bars([y]), color=OURS, marker="D", capsize=3)
        axes.plot([x], [y["median"] / figures["efficiency"]["median"]], color=IDEAL, marker="D")
        below = {"xytext": (0, -14 - 9 * place), "textcoords": "offset points", "ha": "center"}
        axes.annotate(mix, (x, y["median"]), color=INK, fontsize=8, **below)
    axes.set_xlabel("mean exit layer / number of layers")
    axes.set_ylabel("throughput / vanilla vLLM")
    axes.set_title(f"{result['model']}, {result['dtype']}, {workload}", color=INK, fontsize=10)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(target)


def bars(ratios: list[dict[str, float]]) -> list[list[float]]:
    """Lengths below and above the medians, as matplotlib wants them."""
    return [
        [r["median"] - r["low"] for r in ratios],
        [r["high"] - r["median"] for r in ratios],
    ]


def as_markdown(result: dict[str, Any]) -> str:
    """A row for each depth and mix; for each workload the throughput as a multiple of vanilla's,
    and its share of the ideal with a 95% interval (at full depth vanilla is the ideal)."""
    n, names = result["num_layers"], list(result["full_depth_ratio"] | result["mixed"])
    depths = sorted({int(d) for found in result["uniform"].values() for d in found})
    lines = {f"{depth} of {n} layers": ("uniform", str(depth)) for depth in depths}
    lines |= {mix: ("mixed", mix) for found in result["mixed"].values() for mix in found}
    rows = [
        ["full depth", *(_cell({"efficiency": result["full_depth_ratio"].get(w)}) for w in names)]
    ]
    for line, (kind, key) in lines.items():
        rows.append([line, *(_cell(result[kind].get(w, {}).get(key, {})) for w in names)])
    return markdown_table([result["model"], *names], rows)


def _cell(figures: dict[str, Any]) -> str:
    ideal = figures.get("efficiency")
    if ideal is None:
        return ""
    share = "{median:.3f} [{low:.3f}, {high:.3f}]".format(**ideal)
    return f"{figures['speedup']['median']:.2f}; {share}" if "speedup" in figures else share


def together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one model on one machine as one; of what several measured, the last counts.

    Raises `ValueError` for runs that are not comparable.
    """
    whole = copy.deepcopy(results[0])
    for result in results[1:]:
        for name in ("model", "dtype", "machine"):
            if result[name] != whole[name]:
                raise ValueError(f"{name} is {whole[name]!r} and {result[name]!r}")
        for workload, ratio in result["full_depth_ratio"].items():
            whole["full_depth_ratio"][workload] = ratio
        for name in ("uniform", "mixed"):
            for workload, found in result[name].items():
                whole[name].setdefault(workload, {}).update(found)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "outputs", type=Path, nargs="+", help="what the benchmark printed; last lines count"
    )
    parser.add_argument("--workload", default="decode-heavy")
    parser.add_argument("--png", type=Path, required=True)
    args = parser.parse_args()
    results = [json.loads(output.read_text().splitlines()[-1]) for output in args.outputs]
    result = together(results)
    print(as_markdown(result))
    draw(result, args.workload, args.png)


if __name__ == "__main__":
    main()
