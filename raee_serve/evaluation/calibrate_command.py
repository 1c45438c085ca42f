"""`raee-serve calibrate`: choose a task's rule and settings from the table's own rows."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal, cast

from tqdm import tqdm

from raee_serve.errors import RaeeError, TaskError
from raee_serve.evaluation.documents import WORDS, unseen_documents
from raee_serve.retrieval.aggregate import QUALITY
from raee_serve.retrieval.drawing import pyplot
from raee_serve.retrieval.free_text import FreeTextLeaveOneOut
from raee_serve.retrieval.leave_one_out import (
    LABEL_VOTE,
    LABEL_VOTE_K,
    WEIGHED_VOTE,
    LeaveOneOut,
    Outcome,
    frontier,
    shallowest,
)
from raee_serve.retrieval.left_out import left_out
from raee_serve.table.datasets import add_data_argument, add_words_argument
from raee_serve.table.schema import RuleChoice, TaskEntry
from raee_serve.table.store import ExitTable
from raee_serve.table.tasks import get_task

DESCRIPTION = """Ask every row of a task as if the table did not hold it, under every rule and many
settings; print the accuracy-depth frontier, and store the settings that fit the budget in the
table, for servers that are started with it and not told otherwise. No test data is read. Of free
text the accuracy is the share of full depth's quality that is kept, as the table's rows tell it, or
with --generate as answers of the backbone show it."""


@dataclass(frozen=True, slots=True)
class Budget:
    """accuracy or quality: at least `bound`, as shallow as can be; depth: at most `bound`, as
    accurate. Quality is what free text has in the place of accuracy.
    """

    measure: Literal["accuracy", "quality", "depth"]
    bound: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`accuracy>=X`, `quality>=X` or `depth<=Y`, all within 0..1. Raises RaeeError."""
        found = re.fullmatch(r"\s*((accuracy|quality)\s*>=|depth\s*<=)\s*([0-9.]+)\s*", text)
        try:
            bound = float(found[3]) if found else -1.0
        except ValueError:
            bound = -1.0
        if found is None or not 0 <= bound <= 1:
            raise RaeeError(
                f"--budget is {text!r}; allowed: 'accuracy>=X' or 'depth<=Y' (for free text "
                "'quality>=X' or 'depth<=Y') with X and Y within 0..1 (depth as a share of full "
                "depth)"
            )
        return cls(cast(Literal["accuracy", "quality"], found[2]) if found[2] else "depth", bound)

    def check(self, entry: TaskEntry) -> None:
        """Raises RaeeError unless it is one for tasks of that kind."""
        other = "quality" if entry.kind == "labels" else "accuracy"
        if self.measure == other:
            fitting = "accuracy" if other == "quality" else "quality"
            raise RaeeError(
                f"--budget {self} does not fit {entry.name}, a {entry.kind} task; allowed: "
                f"'{fitting}>=X' or 'depth<=Y'"
            )

    def choose(self, outcomes: Sequence[Outcome]) -> Outcome:
        """The best outcome within the budget. Raises RaeeError that says what can be had."""
        if self.measure == "depth":
            within = [o for o in outcomes if o.depth <= self.bound]
            chosen = max(within, key=lambda o: (o.accuracy, -o.depth), default=None)
            nearest = min(outcomes, key=lambda o: o.depth)
        else:
            chosen = shallowest(outcomes, self.bound)
            nearest = max(outcomes, key=lambda o: o.accuracy)
        if chosen is None:
            raise RaeeError(
                f"no setting has {self}; nearest: accuracy {nearest.accuracy:.3f} at depth "
                f"{nearest.depth:.3f} ({describe(nearest.choice)})"
            )
        return chosen

    def __str__(self) -> str:
        return f"{self.measure} {'<=' if self.measure == 'depth' else '>='} {self.bound:g}"


Line = tuple[float, float, str]
"""Depth as a share of full depth, accuracy (or quality), and of what."""


@dataclass(frozen=True, slots=True)
class Tried:
    """on: what the settings were tried on; measure: what `accuracy` is of the outcomes.

    baselines: what needs no exit decision, where it was tried too.
    """

    on: str
    measure: str
    outcomes: Sequence[Outcome]
    baselines: Sequence[Line] = ()


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--table", required=True, metavar="DIR")
    parser.add_argument("--task", required=True, action="append", help="repeat for several")
    parser.add_argument(
        "--budget",
        required=True,
        help="'accuracy>=X' ('quality>=X' for free text), or 'depth<=Y' as a share of full depth",
    )
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw the frontier of one task")
    parser.add_argument(
        "--generate",
        metavar="N",
        type=int,
        help="of free text: have a server of --model answer N training documents that the table "
        "lacks, under several budgets, and choose by the ROUGE-L that is kept of full depth's",
    )
    parser.add_argument("--model", help="the table's backbone, for --generate")
    parser.add_argument(
        "--base-url", metavar="URL", help="a running raee-serve that answers for --generate"
    )
    add_data_argument(parser)
    add_words_argument(parser, WORDS)


def run(args: Namespace) -> None:
    """Calibrate each task. Raises RaeeError for what cannot be, before anything is stored."""
    budget = Budget.parse(args.budget)
    if args.png is not None and len(args.task) > 1:
        raise RaeeError(f"--png draws one task, but {len(args.task)} are given")
    if args.generate is not None and (args.generate < 1 or not args.model):
        raise RaeeError(f"--generate {args.generate} needs at least 1 document, and --model")
    if args.generate is None and (args.model or args.base_url):
        raise RaeeError("--model and --base-url go with --generate N")
    table = ExitTable.open(args.table)
    for name in args.task:
        entry = _entry(table, name)
        budget.check(entry)
        if args.generate is not None and entry.kind == "labels":
            raise TaskError(f"--generate is for free text, and {name} has label words")
    chosen = {name: _calibrate(table, name, budget, args) for name in args.task}
    table.put_choices(chosen)
    for name, choice in chosen.items():
        print(f"raee-serve: {name}: stored {describe(choice)} in {args.table}")


def describe(choice: RuleChoice) -> str:
    text = f"{choice.rule}, k {choice.k}"
    if choice.rule == QUALITY:
        return f"{text}, quality {choice.quality:g}"
    if choice.rule != "published":
        text += f", fraction {choice.fraction:g}"
    return text + (f", vote weight {choice.vote_weight:g}" if choice.rule == "fused" else "")


def _calibrate(table: ExitTable, name: str, budget: Budget, args: Namespace) -> RuleChoice:
    tried = _left_out(table, name) if args.generate is None else _generated(table, name, args)
    best = frontier(tried.outcomes)
    print(f"{name}: {tried.on}")
    print(f"  {'depth':>6} {tried.measure:>9}")
    for depth, accuracy, what in [*tried.baselines, *map(_line, best)]:
        print(f"  {depth:6.3f} {accuracy:9.3f}  {what}")
    chosen = budget.choose(tried.outcomes)
    print(
        f"  chosen for {budget}: {tried.measure} {chosen.accuracy:.3f} at depth {chosen.depth:.3f}"
    )
    if args.png is not None:
        _draw(name, tried, best, chosen, args.png)
    return chosen.choice


def _left_out(table: ExitTable, name: str) -> Tried:
    rows = _rows(table, name)
    progress = tqdm(rows.every_outcome(), desc=f"calibrating {name}", unit=" settings")
    return Tried(
        f"{rows.num_rows} rows, each left out in turn",
        "accuracy" if isinstance(rows, LeaveOneOut) else "quality",
        list(progress),
        _baselines(rows),
    )


def _generated(table: ExitTable, name: str, args: Namespace) -> Tried:
    from raee_serve.evaluation.generated import generated_outcomes

    task = get_task(name)
    examples = unseen_documents(table, task, args.data, args.generate, args.words)
    outcomes = generated_outcomes(args.model, table, task, examples, args.base_url)
    return Tried(f"{len(examples)} documents that the table lacks", "ROUGE-L", outcomes)


def _baselines(rows: LeaveOneOut | FreeTextLeaveOneOut) -> list[Line]:
    """What needs no exit decision."""
    if isinstance(rows, FreeTextLeaveOneOut):
        return list(rows.fixed_exits())
    layer, accuracy = rows.best_layer()
    return [
        (1.0, rows.full_depth(), "full depth"),
        (layer / rows.num_layers, accuracy, f"best fixed layer ({layer}), calibrated"),
        (0.0, rows.label_vote(LABEL_VOTE_K), LABEL_VOTE),
        (0.0, rows.stacked_vote(), WEIGHED_VOTE),
    ]


def _line(outcome: Outcome) -> Line:
    return outcome.depth, outcome.accuracy, describe(outcome.choice)


def _entry(table: ExitTable, name: str) -> TaskEntry:
    entry = table.metadata.tasks.get(name)
    if entry is None:
        known = ", ".join(table.metadata.tasks)
        raise TaskError(f"task {name!r} is not one of {table.uri}; those are: {known}")
    return entry


def _rows(table: ExitTable, name: str) -> LeaveOneOut | FreeTextLeaveOneOut:
    entry, num_layers = table.metadata.tasks[name], table.metadata.backbone.num_layers
    return left_out(table.rows(name), entry, num_layers)


def _draw(name: str, tried: Tried, best: Sequence[Outcome], chosen: Outcome, target: Path) -> None:
    """The frontier, the choice, and what needs no retrieval beside them."""
    figure, axes = pyplot().subplots(figsize=(6, 4), dpi=150)
    axes.step([o.depth for o in best], [o.accuracy for o in best], where="post", label="frontier")
    axes.plot([chosen.depth], [chosen.accuracy], "o", label=f"chosen: {describe(chosen.choice)}")
    for (depth, accuracy, what), marker in zip(tried.baselines, cycle("s^x+"), strict=False):
        axes.plot([depth], [accuracy], marker, label=what)
    axes.set(xlabel="mean depth / full depth", ylabel=f"{tried.measure} on {tried.on}", title=name)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target)
