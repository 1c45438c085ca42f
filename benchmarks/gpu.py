"""Truncated execution on a GPU: vanilla vLLM with its defaults, cut shapes, and this.

Models of real shape with dummy weights; vanilla is compiled and graphed, and schedules
asynchronously, unless --eager. First vanilla vLLM generates something at all, and a batch of mixed
depths is compared with checkpoints cut to them. Then rows, the most important first, until the time
is up. In each round of a row all engines that it needs run once, A B .. B A .., with the same new
prompts.

- speedup: this / vanilla at full depth (throughput).
- efficiency: ideal time / time taken. The ideal of a uniform depth is vanilla on the shape cut to
  it, which at full depth is vanilla itself; that of a mix is `depths.ideal_parts`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from vllm.platforms import current_platform

from benchmarks.deadline import Deadline, OutOfTime
from benchmarks.engine_process import EngineError, cpu_environment
from benchmarks.fleet import Fleet, Machinery
from benchmarks.gpu_check import check
from benchmarks.gpu_rows import HEADINGS, Measured, Row, as_line, measure, rows, told
from benchmarks.machine import machine
from benchmarks.shapes import SHAPES

DEFAULT_SHAPES = ["llama-3.1-8b", "gemma-2-9b"]
MEMORY_SHARE = 0.94
"""Of the GPU's memory."""


def run(args: argparse.Namespace, workdir: Path) -> dict[str, Any]:
    """All figures; `error` has what an engine ended with, which ends the rest of its shape."""
    deadline = Deadline(args.minutes * 60)
    settings = {"enforce_eager": True} if args.eager else {}
    if args.attention_backend is not None:
        settings["attention_backend"] = args.attention_backend
    machinery = Machinery(workdir, environment(), memory_bytes(), settings, args.logs)
    result: dict[str, Any] = {"machine": machine(), "settings": settings, "shapes": {}}
    if not args.skip_check:
        try:
            result["parity"] = check(machinery, deadline)
        except EngineError as error:
            print(error, file=sys.stderr, flush=True)
            return result | {"error": str(error)}
        print(f"parity on random weights, float32: {result['parity']}", flush=True)
    table = table_of(args)
    for place, name in enumerate(args.shapes):
        fleet = Fleet(SHAPES[name], machinery, deadline.share(len(args.shapes) - place))
        try:
            result["shapes"][name] = shape_measured(fleet, table, args.pairs)
        finally:
            fleet.close()
    return result


def shape_measured(fleet: Fleet, table: Sequence[float] | None, pairs: int) -> dict[str, Any]:
    """The rows of one shape; those that there was no time for are marked so."""
    planned = rows(fleet.shape.num_layers, table)
    found: list[Measured | None] = []
    result: dict[str, Any] = {"num_layers": fleet.shape.num_layers}
    print(f"\n{fleet.shape.name}, {fleet.shape.num_layers} layers\n{HEADINGS}", flush=True)
    try:
        with suppress(OutOfTime):
            fleet.bring(list(dict.fromkeys(depth for row in planned for depth in row.exits)))
        for row in planned:
            found.append(measured_in_time(fleet, row, pairs))
            print(as_line(row, found[-1]), flush=True)
    except EngineError as error:
        result["error"] = str(error)
        print(error, file=sys.stderr, flush=True)
    found += [None] * (len(planned) - len(found))
    result["startup_s"] = fleet.startup_s
    result["rows"] = [told(*each) for each in zip(planned, found, strict=True)]
    return result


def measured_in_time(fleet: Fleet, row: Row, pairs: int) -> Measured | None:
    try:
        return measure(fleet, row, pairs)
    except OutOfTime:
        return None


def is_sound(result: dict[str, Any]) -> bool:
    """Whether all engines ran, and gave the tokens that they should."""
    errors = ["error" in part for part in (result, *result["shapes"].values())]
    return not any(errors) and not result.get("parity", {}).get("wrong")


def environment() -> dict[str, str]:
    """Of the engines' processes; on a GPU vLLM's own choices."""
    return cpu_environment() if current_platform.is_cpu() else {}


def memory_bytes() -> float:
    """For all engines together; without a GPU, which is for trying out, half of what is free."""
    if current_platform.is_cpu():
        return psutil.virtual_memory().available / 2
    return MEMORY_SHARE * current_platform.get_device_total_memory()


def table_of(args: argparse.Namespace) -> list[float] | None:
    """Share of a table's rows that exit at each layer, if one was named."""
    if args.exits is not None:
        return json.loads(args.exits.read_text(encoding="utf-8"))
    if args.table is None:
        return None
    from benchmarks.table_exits import table_exits  # needs LanceDB

    return table_exits(args.table, args.task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=DEFAULT_SHAPES,
        choices=SHAPES,
        help=f"default: {' '.join(DEFAULT_SHAPES)}; tiny is for trying this out",
    )
    parser.add_argument("--minutes", type=float, default=10, help="in all, shared out equally")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="neither compiled nor graphed")
    parser.add_argument(
        "--attention-backend", metavar="NAME", help="as of vLLM, for both sides (default: its own)"
    )
    parser.add_argument("--table", metavar="DIR", help="a mix with the exits of its rows, too")
    parser.add_argument("--task", help="of the table")
    parser.add_argument(
        "--exits",
        type=Path,
        metavar="FILE",
        help="what `benchmarks.table_exits` printed elsewhere, in the place of --table",
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the engines say")
    parser.add_argument("--skip-check", action="store_true", help="only measure")
    args = parser.parse_args()
    if (args.table is None) != (args.task is None):
        parser.error("--table and --task go together")
    if args.logs is not None:
        args.logs.mkdir(parents=True, exist_ok=True)
    print(f"vLLM is imported: {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as workdir:
        result = run(args, Path(workdir))
    print(json.dumps(result))
    raise SystemExit(0 if is_sound(result) else 1)


if __name__ == "__main__":
    main()
