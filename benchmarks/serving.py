"""Servers under load: raee-serve, vanilla vLLM, and vanilla on a checkpoint cut to the mean depth.

Label tasks are asked for one label: this by the task's name, vanilla with its output limited to the
labels' first tokens. All three live side by side; while one is measured the others are stopped
(SIGSTOP). In each round each load is put on each system, A B C, then B C A: the same requests at
the same times. The load generator is that of `vllm bench serve`. Before the rounds of a shape one
run warms up and says how fast vanilla is (request rates are shares of that) and how deep raee-serve
goes on average.

- saturation_rps_ratio: requests/s of this / vanilla's with `--concurrency` requests under way.
- over_cut_checkpoint: requests/s of this / those of a checkpoint cut to the same mean depth; as
  that lies between whole layers, see `serving_report.over_cut`.
- lists_ratio: prompts/s of this / vanilla's where requests are lists of 16 prompts, as many prompts
  under way. Not for chats and summaries.
- accuracy: mean over tasks, of the answers given at saturation.
- ttft_p50_added_ms: median time to the first token at the lowest rate, minus vanilla's.

Figures are medians over rounds, of paired ratios where they are ratios.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.arguments import add_model_arguments
from benchmarks.machine import machine
from benchmarks.serving_load import Generator, Load
from benchmarks.serving_report import (
    CUT,
    LISTS,
    OURS,
    SATURATION,
    SYSTEMS,
    VANILLA,
    Run,
    draw,
    headline,
    summary,
    write_csv,
)
from benchmarks.serving_shapes import Asked, Shape, Texts
from benchmarks.serving_systems import ServedSystem, raee_server, vanilla_server
from benchmarks.tables import build_table
from raee_serve.checkpoints import local_checkpoint
from raee_serve.cut import cut_checkpoint
from raee_serve.errors import RaeeError
from raee_serve.fingerprint import identify_backbone
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import HUB, add_data_argument
from raee_serve.tasks.registry import get_task

CLASSIFICATION, SUMMARISATION = "classification", "summarisation"
SEVEN = ("cr", "mpqa", "mr", "sst2", "sst5", "subj", "trec")
WARM_UP = 4
"""Requests before each run; of each system's first run all requests are a warm-up."""
LIST_OF = 16
"""Prompts of a request under the load LISTS, all of one task."""
FEWEST = 8
"""Requests of a run at a low rate, however long it takes."""


class Comparison:
    """The servers of one model, started once and measured in turns."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack, workdir: Path) -> None:
        self._args = args
        self._workdir = workdir
        self.checkpoint = local_checkpoint(args.model)
        self.num_layers = identify_backbone(self.checkpoint).num_layers
        log = stack.enter_context((workdir / "load.log").open("w"))
        self._generator = Generator(args.model, AutoTokenizer.from_pretrained(self.checkpoint), log)
        ours = raee_server(
            args.model, args.table, args.dtype, args.serve_flags, workdir / "raee-serve.log"
        )
        self._systems = {
            VANILLA: stack.enter_context(self._vanilla(VANILLA, self.checkpoint)),
            OURS: stack.enter_context(ours),
        }

    def measure(self, shape: Shape) -> tuple[list[Run], dict[str, Any]]:
        """The counted runs of one shape, and what they say."""
        texts = Texts(shape, self._args.data, self._args.words)
        vanilla_rps, depth = self._warm_up(shape, texts)
        layers = min(max(round(depth), 1), self.num_layers - 1)
        cut = cut_checkpoint(self.checkpoint, layers, self._workdir / f"cut-{layers}")
        loads = {f"{share:g}": share * vanilla_rps for share in sorted(self._args.rates)}
        loads[SATURATION] = math.inf
        if shape.has_lists:
            loads[LISTS] = math.inf
        with self._vanilla(CUT, cut) as system:
            runs, answers = self._rounds(shape, texts, loads, {**self._systems, CUT: system})
        return runs, summary(runs, self.num_layers, layers, answers)

    def _warm_up(self, shape: Shape, texts: Texts) -> tuple[float, float]:
        """Vanilla's requests/s at saturation, and the mean exit layer of raee-serve."""
        asked = texts.take(WARM_UP + shape.rows)
        vanilla, ours = (
            self._run(self._systems[name], (shape, 0, SATURATION), math.inf, asked)[0]
            for name in (VANILLA, OURS)
        )
        assert ours.mean_exit_layer is not None
        return vanilla.rps, ours.mean_exit_layer

    def _rounds(
        self,
        shape: Shape,
        texts: Texts,
        loads: Mapping[str, float],
        systems: Mapping[str, ServedSystem],
    ) -> tuple[list[Run], dict[str, list[tuple[Asked, str]]]]:
        """The runs, and the answers of each system at saturation."""
        runs: list[Run] = []
        answers: dict[str, list[tuple[Asked, str]]] = {name: [] for name in SYSTEMS}
        for number in range(1, self._args.rounds + 1):
            for load, rate in loads.items():
                asked = texts.take(WARM_UP + self._count(shape, load, rate))
                for name in rotated(SYSTEMS, number):
                    run, said = self._run(systems[name], (shape, number, load), rate, asked)
                    runs.append(run)
                    if load == SATURATION:
                        answers[name] += zip(asked[WARM_UP:], said, strict=True)
        return runs, answers

    def _count(self, shape: Shape, load: str, rate: float) -> int:
        """Prompts of a run."""
        if load == LISTS:  # whole lists of every task
            once = LIST_OF * len(shape.tasks)
            return once * math.ceil(shape.rows / once)
        if math.isinf(rate):
            return shape.rows
        return max(FEWEST, round(rate * self._args.seconds))

    def _run(
        self,
        system: ServedSystem,
        place: tuple[Shape, int, str],
        rate: float,
        asked: Sequence[Asked],
    ) -> tuple[Run, list[str]]:
        """One run after a few requests that warm up, and its answers in the order asked.

        place: shape, round, load.
        """
        shape, number, load = place
        ours = system.name == OURS
        list_of = LIST_OF if load == LISTS else 1
        at_once = max(1, self._args.concurrency // list_of) if math.isinf(rate) else None
        arrivals = Load(rate, at_once, number, list_of)
        with system.awake():
            first, counted = asked[:WARM_UP], asked[WARM_UP:]
            self._generator.run(system.url, shape, first, Load(math.inf, None, 0), ours)
            before = system.decided()
            result = self._generator.run(system.url, shape, counted, arrivals, ours)
            made = system.decided().since(before)
        run = Run.of((shape.name, number, load, system.name), rate, result, made, list_of)
        print(run, flush=True)
        return run, result["generated_texts"]

    def _vanilla(self, name: str, checkpoint: Path) -> AbstractContextManager[ServedSystem]:
        log = self._workdir / f"{name.replace(' ', '-')}.log"
        return vanilla_server(name, checkpoint, self._args.model, self._args.dtype, log)


def rotated(names: Sequence[str], by: int) -> list[str]:
    """A B C, B C A, C A B, ...: no system is always the one that comes after another."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def shapes(args: argparse.Namespace) -> list[Shape]:
    """Those for which tasks are given."""
    asked = (
        Shape(CLASSIFICATION, tuple(map(get_task, args.tasks)), 1, args.rows),
        Shape(
            SUMMARISATION,
            tuple(map(get_task, args.summary_tasks)),
            args.output_len,
            args.summary_rows,
        ),
    )
    return [shape for shape in asked if shape.tasks]


def check_table(args: argparse.Namespace) -> None:
    """Raises RaeeError unless the table has all the tasks that requests will name."""
    known = ExitTable.open(args.table).metadata.tasks
    if missing := {*args.tasks, *args.summary_tasks} - known.keys():
        raise RaeeError(f"{args.table} has no tasks {sorted(missing)}; it has {sorted(known)}")


def measure(args: argparse.Namespace, workdir: Path) -> tuple[dict[str, Any], list[Run]]:
    with ExitStack() as stack:
        comparison = Comparison(args, stack, workdir)
        found = {shape.name: comparison.measure(shape) for shape in shapes(args)}
    named = ("model", "dtype", "rounds", "concurrency", "rates", "seconds", "serve_flags")
    first = shapes(args)[0]
    result = {
        **headline(found[first.name][1], first.tasks),
        **{name: getattr(args, name) for name in named},
        "machine": machine(),
        "shapes": {
            shape.name: {
                "tasks": [task.name for task in shape.tasks],
                "rows": shape.rows,
                "output_len": shape.output_len,
                **found[shape.name][1],
            }
            for shape in shapes(args)
        },
    }
    return result, [run for runs, _ in found.values() for run in runs]


def write(result: dict[str, Any], runs: Sequence[Run], out: Path) -> None:
    """serving.json, serving.csv, and a picture of each shape."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "serving.json").write_text(json.dumps(result, indent=2))
    write_csv(runs, out / "serving.csv")
    for name in result["shapes"]:
        own = [run for run in runs if run.shape == name]
        draw(own, f"{result['model']}, {result['dtype']}, {name}", out / f"serving-{name}.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Flags not listed here go to raee-serve's server.",
        allow_abbrev=False,
    )
    add_model_arguments(parser, model="gemma3-270m")
    add_data_argument(parser)
    parser.add_argument("--table", metavar="DIR", help="exit table (default: built for the run)")
    parser.add_argument(
        "--table-rows", type=int, default=2000, metavar="N", help="a task, if it is built"
    )
    parser.add_argument(
        "--tasks",
        nargs="*",
        help=f"of classification (default: {' '.join(SEVEN)}; without data demo_sentiment)",
    )
    parser.add_argument(
        "--summary-tasks",
        nargs="*",
        help="of summarisation (default: cnndm xsum; without data none)",
    )
    parser.add_argument("--words", type=int, default=150, help="of a document (default: 150)")
    parser.add_argument("--output-len", type=int, default=48, help="of a summary (default: 48)")
    parser.add_argument(
        "--rows", type=int, default=280, metavar="N", help="of a run at saturation (default: 280)"
    )
    parser.add_argument(
        "--summary-rows", type=int, default=32, metavar="N", help="of summarisation (default: 32)"
    )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="*",
        default=[0.2, 0.5, 0.8, 1.1],
        metavar="SHARE",
        help="request rates, as shares of vanilla's at saturation (default: 0.2 0.5 0.8 1.1); "
        "saturation itself is always measured",
    )
    parser.add_argument(
        "--seconds", type=float, default=12, help="of a run at a rate (default: 12)"
    )
    parser.add_argument("--concurrency", type=int, default=64, help="at saturation (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for JSON, CSV and pictures")
    args, args.serve_flags = parser.parse_known_args()
    has_data = args.data is not None and (args.data == HUB or Path(args.data).is_dir())
    if args.tasks is None:
        args.tasks = SEVEN if has_data else ["demo_sentiment"]
    if args.summary_tasks is None:
        args.summary_tasks = ["cnndm", "xsum"] if has_data else []
    return args


def main() -> None:
    args = parse_arguments()
    print(machine())
    with tempfile.TemporaryDirectory() as workdir:
        if args.table:
            check_table(args)
        else:
            args.table = str(Path(workdir) / "table")
            tasks = [*args.tasks, *args.summary_tasks]
            build_table(args.model, tasks, args.table, args.table_rows, args.data)
        result, runs = measure(args, Path(workdir))
    if args.out:
        write(result, runs, args.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
