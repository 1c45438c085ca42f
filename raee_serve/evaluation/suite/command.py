"""`raee-serve eval suite`: one study after the other, each kept when it is done."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raee_serve.errors import RaeeError
from raee_serve.evaluation.suite import (
    evidence,
    findings,
    finetuned,
    index,
    keys,
    neighbours,
    paper,
    peer_speed,
    peers,
    shift,
    size,
)
from raee_serve.evaluation.suite.findings import Findings
from raee_serve.evaluation.suite.material import Material, Source
from raee_serve.evaluation.suite.report import draw, write_report
from raee_serve.retrieval.aggregate import RULES
from raee_serve.retrieval.drawing import pyplot
from raee_serve.table.datasets import add_data_argument


@dataclass(frozen=True, slots=True)
class Study:
    """question: what it answers; run: from the material to what was found.

    serves: whether a part of it is measured on servers.
    """

    question: str
    run: Callable[[Material], Findings]
    serves: bool = False


STUDIES = {
    "paper": Study(paper.QUESTION, paper.run, serves=True),
    "k": Study(neighbours.QUESTION, neighbours.run),
    "keys": Study(keys.QUESTION, keys.run),
    "size": Study(size.QUESTION, size.run),
    "index": Study(index.QUESTION, index.run),
    "shift": Study(shift.QUESTION, shift.run),
    "evidence": Study(evidence.QUESTION, evidence.run),
    "finetuned": Study(finetuned.QUESTION, finetuned.run),
    "peers": Study(peers.QUESTION, peers.run, serves=True),
}
ALL = "all"

DESCRIPTION = """Studies on an exit table and its test rows, decided by the server's own
code.
Each leaves NAME.json, NAME.csv and NAME.png in --out, and is not run again while model, table and
settings stay; report.html and report.md there show all of them. paper and peers also measure speed,
on servers that they start."""
LEAST_SERVED = 2 * len(RULES)
"""Two prompts for each rule."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "study", choices=[*STUDIES, ALL], metavar="NAME", help=", ".join([*STUDIES, ALL])
    )
    parser.add_argument("--model", required=True, help="backbone")
    parser.add_argument("--table", required=True, metavar="DIR", help="its exit table")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for what is found")
    parser.add_argument("--task", action="append", default=[], help="default: all of the table")
    parser.add_argument("--limit", type=int, metavar="N", help="test rows a task (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    parser.add_argument(
        "--served",
        type=int,
        default=400,
        metavar="N",
        help="prompts of a label-word task of which speed is measured, by peers at most "
        f"{peer_speed.PROMPTS}; 0: none (default: 400)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=32,
        metavar="N",
        help="of a free-text task, summarised and scored; 0: none (default: 32)",
    )
    add_data_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Raises RaeeError for a table, task or data set that does not fit."""
    if args.limit is not None and args.limit < 2:
        raise RaeeError(f"--limit is {args.limit}; allowed: at least 2")
    for flag, value, least in (
        ("--served", args.served, LEAST_SERVED),
        ("--documents", args.documents, 2),
    ):
        if value and value < least:
            raise RaeeError(f"{flag} is {value}; allowed: 0, or at least {least}")
    pyplot()  # without it nothing need be begun
    args.out.mkdir(parents=True, exist_ok=True)
    names = list(STUDIES) if args.study == ALL else [args.study]
    with TemporaryDirectory() as scratch:
        source = Source(
            args.model,
            args.table,
            args.data,
            args.limit,
            args.seed,
            Path(scratch),
            args.served,
            args.documents,
        )
        material = Material.of(source, args.task)
        if args.served and any(STUDIES[name].serves for name in names):
            _check_enough(material)
        for name in names:
            print(f"raee-serve: {name}: {STUDIES[name].question}", flush=True)
            _study(name, material, args.out)
            for own in Path(scratch).iterdir():  # its tables
                shutil.rmtree(own)
    print(f"raee-serve: {write_report(args.out, STUDIES)}", flush=True)


def _check_enough(material: Material) -> None:
    """Raises RaeeError for a task with too few prompts to measure speed on."""
    for task in material.tasks:
        asked = len(material.asked(task).golds)
        if asked < LEAST_SERVED:
            raise RaeeError(
                f"{asked} prompts of task {task.name} to measure speed on; allowed: at least "
                f"{LEAST_SERVED} (--limit), or --served 0"
            )


def _study(name: str, material: Material, out: Path) -> None:
    """Run it, unless what it found under the same settings is there."""
    settings = _settings(material)
    if STUDIES[name].serves:
        settings |= {
            "served": material.source.served,
            "documents": material.source.documents,
            "summaries": [task.name for task in material.summaries],
        }
    kept = out / f"{name}.json"
    if kept.is_file() and findings.made_with(kept.read_text(), settings):
        print(f"raee-serve: {name}: kept from before", flush=True)
        return
    found = STUDIES[name].run(material)
    (out / f"{name}.csv").write_text(findings.as_csv(found))
    draw(found, STUDIES[name].question, out / f"{name}.png")
    kept.write_text(
        findings.as_json(name, STUDIES[name].question, settings, found)
    )  # last: then it is whole


def _settings(material: Material) -> dict[str, Any]:
    source = material.source
    return {
        "model": Path(source.model).name,
        "backbone": material.backbone.weights,
        "table": material.table.state,
        "rows": {task.name: material.table.count(task.name) for task in material.tasks},
        "prompts": {task.name: len(material.asked(task).golds) for task in material.tasks},
        "limit": source.limit,
        "seed": source.seed,
    }
