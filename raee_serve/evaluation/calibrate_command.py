"""`raee-serve calibrate`: choose a task's budget and neighbours from the table's own rows."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal, cast

import numpy as np

from raee_serve.errors import RaeeError, TaskError
from raee_serve.evaluation.documents import WORDS, unseen_documents
from raee_serve.exits.choice import Choice
from raee_serve.exits.neighbours import VOTERS, neighbour_votes
from raee_serve.exits.replay import Outcome, Replay, frontier, shallowest_with
from raee_serve.exits.shrinkage import kept_quality
from raee_serve.records import EXIT_HEADS
from raee_serve.retrieval.drawing import pyplot
from raee_serve.retrieval.replayed import replay_of
from raee_serve.table.schema import TaskEntry
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import add_data_argument, add_words_argument
from raee_serve.tasks.registry import by_name, get_task

DESCRIPTION = """Ask every row of a task as if the table did not hold it, with several numbers of
neighbours and many budgets; print the accuracy-depth frontier, and store the settings that fit
--budget in the table, for servers that are started with it and not told otherwise. No test data is
read. Of free text the accuracy is the share of full depth's quality that is kept, as the table's
rows tell it, or with --generate as answers of the backbone show it."""


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
            chosen = shallowest_with(outcomes, self.bound)
            nearest = max(outcomes, key=lambda o: o.accuracy)
        if chosen is None:
            raise RaeeError(
                f"no setting has {self}; nearest: accuracy {nearest.accuracy:.3f} at depth "
                f"{nearest.depth:.3f} ({nearest.choice})"
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
    parser.add_argument(
        "--task",
        required=True,
        action="append",
        metavar="NAME|FILE",
        help="task of the table, or its task file; repeatable",
    )
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
    if args.png is not None and not args.png.parent.is_dir():
        raise RaeeError(f"--png {args.png}: there is no directory {args.png.parent}")
    table = ExitTable.open(args.table)
    names = by_name(args.task)
    for name in names:
        entry = _entry(table, name)
        budget.check(entry)
        if args.generate is not None and entry.kind == "labels":
            raise TaskError(f"--generate is for free text, and {name} has labels")
    chosen = {name: _calibrate(table, name, budget, args) for name in names}
    table.put_choices(chosen)
    for name, choice in chosen.items():
        print(f"raee-serve: {name}: stored {choice} in {args.table}")


def _calibrate(table: ExitTable, name: str, budget: Budget, args: Namespace) -> Choice:
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
    rows = replay_of(table, name)
    if rows.kind == "plain":
        raise TaskError(
            f"task {name} has no probes ({table.metadata.built[name].no_fit}): exits of its plain "
            "head go by the paper's rule, which has no budget"
        )
    is_free_text = rows.kind == "free-text"
    return Tried(
        f"{rows.num_rows} rows, each left out in turn",
        "quality" if is_free_text else "accuracy",
        rows.outcomes(rows.every_choice()),
        _fixed_exits(rows) if is_free_text else _baselines(table, name, rows),
    )


def _generated(table: ExitTable, name: str, args: Namespace) -> Tried:
    from raee_serve.evaluation.generated import generated_outcomes

    task = get_task(by_name(args.task)[name])
    examples = unseen_documents(table, task, args.data, args.generate, args.words)
    outcomes = generated_outcomes(args.model, table, task, examples, args.base_url)
    return Tried(f"{len(examples)} documents that the table lacks", "ROUGE-L", outcomes)


def _baselines(table: ExitTable, name: str, replay: Replay) -> list[Line]:
    """What needs no exit decision."""
    rows, by_layer = table.rows(name), replay.worth[:, 0].mean(axis=0, dtype=float)
    assert rows.golds is not None
    own = np.arange(len(rows))
    about = rows.vectors, own, rows.vectors, rows.golds, len(table.metadata.tasks[name].labels)
    vote = float((neighbour_votes(*about).argmax(axis=1) == rows.golds).mean())
    best = int(by_layer.argmax())
    lines = [
        (1.0, float(by_layer[-1]), "full depth, by probe"),
        ((best + 1) / len(by_layer), float(by_layer[best]), f"best fixed layer ({best + 1})"),
        (0.0, vote, f"label vote of {VOTERS} neighbours, no model"),
    ]
    if rows.plain_probs is None:
        return lines
    return [(1.0, float((rows.plain_probs[:, -1] > 0).mean()), "full depth, by LM head"), *lines]


def _fixed_exits(replay: Replay) -> list[Line]:
    """What each probed exit of free text keeps, were all rows to take it."""
    kept = kept_quality(replay.worth)
    return [
        ((at + 1) / replay.num_layers, float(kept[place, at]), f"layer {at + 1} for all, {head}")
        for place, head in enumerate(EXIT_HEADS)
        for at in np.flatnonzero(kept[place])
    ]


def _line(outcome: Outcome) -> Line:
    return outcome.depth, outcome.accuracy, str(outcome.choice)


def _entry(table: ExitTable, name: str) -> TaskEntry:
    entry = table.metadata.tasks.get(name)
    if entry is None:
        known = ", ".join(table.metadata.tasks)
        raise TaskError(f"task {name!r} is not one of {table.uri}; those are: {known}")
    return entry


def _draw(name: str, tried: Tried, best: Sequence[Outcome], chosen: Outcome, target: Path) -> None:
    """The frontier, the choice, and what needs no retrieval beside them."""
    figure, axes = pyplot().subplots(figsize=(6, 4), dpi=150)
    axes.step([o.depth for o in best], [o.accuracy for o in best], where="post", label="frontier")
    axes.plot([chosen.depth], [chosen.accuracy], "o", label=f"chosen: {chosen.choice}")
    for (depth, accuracy, what), marker in zip(tried.baselines, cycle("s^x+"), strict=False):
        axes.plot([depth], [accuracy], marker, label=what)
    axes.set(xlabel="mean depth / full depth", ylabel=f"{tried.measure} on {tried.on}", title=name)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target)
