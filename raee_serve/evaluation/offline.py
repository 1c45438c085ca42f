"""`raee-serve eval --offline`: what retrieved exits make of a task's test rows, without a server.

Each test row is probed once. Decisions are made by the server's own retriever under several
budgets, and each is answered as the server answers it: by the probe that the decision names, with
the decision's label scores added.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from raee_serve.checkpoints import local_checkpoint
from raee_serve.errors import RaeeError, TaskError
from raee_serve.evaluation.metrics import score_labels
from raee_serve.evaluation.offline_report import BASELINES, as_json, as_table
from raee_serve.evaluation.probed import LabelRows, Remembering, label_rows, quality_of
from raee_serve.exits.baselines import logistic_regression
from raee_serve.exits.choice import Choice
from raee_serve.exits.fit import TaskFit
from raee_serve.exits.neighbours import neighbour_votes
from raee_serve.fingerprint import identify_backbone
from raee_serve.records import EXIT_HEADS, ExitDecision
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.points_command import points_named
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.server.settings import DepthSettings
from raee_serve.shortcuts import stored_shortcuts
from raee_serve.table.probe import LayerProbe
from raee_serve.table.schema import TableMetadata, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import Example
from raee_serve.tasks.task import Task

BUDGETS = (0.9, 0.95, 0.98, 0.99)
AT_ONCE = 256
"""Prompts looked up together."""


@dataclass(frozen=True, slots=True)
class Answers:
    """One way's answers to a task's test rows.

    gained: [n] whether a row is answered correctly; of free text its quality. score: of all rows,
    by the task's metric; of free text the share of full depth's quality that is kept.
    depth: mean exit layer / num_layers, 0 without a model. reasons: how many rows got their depth
    for which reason; empty where nothing is decided.
    """

    gained: NDArray
    score: float
    depth: float
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One task. budgets: our answers under each; published: by the paper's rule on plain heads.

    baselines: None for those that the task does not allow; free text has full depth alone.
    """

    task: Task
    budgets: dict[float, Answers]
    published: Answers | None
    baselines: dict[str, Answers | None]


def run(
    args: argparse.Namespace,
    rest: Sequence[str],
    tasks: Sequence[Task],
    examples: Mapping[str, Sequence[Example]],
) -> None:
    """Evaluate and print; `rest` are flags of `serve` that decisions depend on.

    Raises RaeeError for what cannot be evaluated offline, before anything is loaded.
    """
    if not args.table or args.base_url:
        raise RaeeError("--offline needs --table DIR and no --base-url: there is no server")
    own = vars(_server_flags(rest))
    points = points_named(own.pop("exit_points"), args.table)
    settings = DepthSettings(table=args.table, k=args.k, exit_points=points, **own)
    budgets = sorted({Choice(1, budget).budget for budget in args.budgets or BUDGETS})
    _check(tasks, ExitTable.open(args.table).metadata, args.table)
    results = list(evaluate(args.model, settings, tasks, examples, budgets))
    if not args.json:
        print(as_table(results))
    print(as_json(results), flush=True)


def evaluate(
    model: str,
    settings: DepthSettings,
    tasks: Sequence[Task],
    examples: Mapping[str, Sequence[Example]],
    budgets: Sequence[float],
) -> Iterator[Evaluated]:
    """The answers to each task, in order."""
    assert settings.table
    table = ExitTable.open(settings.table)
    checkpoint = local_checkpoint(model)
    backbone = identify_backbone(checkpoint)
    shortcuts = stored_shortcuts(settings.table, settings.shortcuts_file, backbone)
    name = settings.encoder or table.metadata.encoder.name
    encoder = Remembering(Encoder(name, torch.get_num_threads()))
    retriever = ExitRetriever.open(
        settings.table,
        backbone=backbone,
        encoder=encoder,
        max_distance=settings.max_distance,
        exit_points=settings.exit_points,
        shortcuts=shortcuts,
    )
    layers = LayerProbe(checkpoint, shortcuts=shortcuts)
    for task in tasks:
        asked = Asked(retriever, task.name, [e.text for e in examples[task.name]], settings.k)
        if task.kind == "free-text":
            yield _free_text(layers, task, table, examples[task.name], asked, budgets)
        else:
            vectors = encoder.encode(asked.texts)
            yield _labels(layers, task, table, examples[task.name], asked, budgets, vectors)


@dataclass(frozen=True, slots=True)
class Asked:
    """The texts of a task whose exits are looked up. k: neighbours; None for the task's own."""

    retriever: ExitRetriever
    task: str
    texts: Sequence[str]
    k: int | None

    def decisions(self, **options: object) -> list[ExitDecision]:
        """options: further ones of each `Lookup`."""
        lookups = [Lookup((self.task,), text, k=self.k, **options) for text in self.texts]  # type: ignore[arg-type]
        return [
            decision
            for start in range(0, len(lookups), AT_ONCE)
            for decision in self.retriever.decide(lookups[start : start + AT_ONCE])
        ]


def _labels(
    layers: LayerProbe,
    task: Task,
    table: ExitTable,
    examples: Sequence[Example],
    asked: Asked,
    budgets: Sequence[float],
    vectors: NDArray[np.float32],
) -> Evaluated:
    entry, fit = table.metadata.tasks[task.name], table.fit(task.name)
    rows = label_rows(layers, task, entry, fit, examples)

    def ours(decisions: Sequence[ExitDecision], alone: str | None) -> Answers:
        predicted = answered(rows, decisions, alone)
        return _decided(predicted == rows.golds, _score(task, rows, predicted), decisions)

    found = {budget: ours(asked.decisions(budget=budget), rows.alone) for budget in budgets}
    paper = None if rows.plain is None else ours(asked.decisions(head="plain"), None)
    without: dict[str, Answers | None] = dict.fromkeys(BASELINES)
    beside = baselines(table.rows(task.name), fit, rows, vectors, len(task.labels))
    for name, (predicted, depth) in beside.items():
        score = _score(task, rows, predicted)
        without[name] = Answers(predicted == rows.golds, score, depth)
    return Evaluated(task, found, paper, without)


def answered(
    rows: LabelRows, decisions: Sequence[ExitDecision], alone: str | None
) -> NDArray[np.int64]:
    """[n] labels that a server would answer under these decisions.

    alone: the probe that answers where a decision names none; None for the plain head.
    """
    predicted = np.empty(len(decisions), np.int64)
    for i, decision in enumerate(decisions):
        name = decision.probe or alone
        if name is None:
            assert rows.plain is not None
            scores = rows.plain[i, decision.exit_layer - 1]
        else:
            scores = rows.scores[name][i]
        predicted[i] = np.argmax(scores + np.array(decision.label_scores or 0.0))
    return predicted


def baselines(
    table: TaskRows,
    fit: TaskFit | None,
    rows: LabelRows,
    vectors: NDArray[np.float32],
    num_labels: int,
) -> dict[str, tuple[NDArray, float]]:
    """(predicted labels [n], depth) by name, of those that the task allows.

    table: its rows of a label task. vectors: [n, dimension] of the test rows.
    """
    assert table.golds is not None
    queries = vectors, np.full(len(vectors), -1)  # none of them is a row
    votes = neighbour_votes(*queries, table.vectors, table.golds, num_labels)
    found: dict[str, tuple[NDArray, float]] = {}
    if rows.plain is not None and table.full_logprobs is not None:
        full = rows.plain[:, -1]
        found["full"] = full.argmax(axis=1), 1.0
        found["full_calibrated"] = (full - table.full_logprobs.mean(axis=0)).argmax(axis=1), 1.0
    if fit is not None and rows.alone is not None:
        layer = fit.layers[int(fit.is_right.mean(axis=0).argmax())]
        own = rows.scores[f"{rows.alone.rpartition('/')[0]}/{layer}"]
        scores = own + fit.front_scores(layer, vectors, votes)
        found["best_fixed_layer"] = scores.argmax(axis=1), layer / fit.layers[-1]
    found["label_vote"] = votes.argmax(axis=1), 0.0
    found["logistic_regression"] = logistic_regression(table.vectors, table.golds, vectors), 0.0
    return found


def _free_text(
    layers: LayerProbe,
    task: Task,
    table: ExitTable,
    examples: Sequence[Example],
    asked: Asked,
    budgets: Sequence[float],
) -> Evaluated:
    quality = quality_of(layers, task, table.metadata.tasks[task.name], examples)
    full, rows = quality[:, 0, -1], np.arange(len(quality))

    def ours(budget: float) -> Answers:
        decisions = asked.decisions(budget=budget)
        exits = [(EXIT_HEADS.index(d.head), d.exit_layer - 1) for d in decisions]
        gained = quality[rows, *np.array(exits).T]
        kept = float(gained.mean() / full.mean()) if full.any() else 0.0
        return _decided(gained, kept, decisions)

    found = {budget: ours(budget) for budget in budgets}
    without = dict.fromkeys(BASELINES) | {"full": Answers(full, 1.0, 1.0)}
    return Evaluated(task, found, None, without)


def _decided(gained: NDArray, score: float, decisions: Sequence[ExitDecision]) -> Answers:
    depth = np.mean([decision.exit_layer / decision.num_layers for decision in decisions])
    return Answers(gained, score, float(depth), Counter(d.reason.value for d in decisions))


def _score(task: Task, rows: LabelRows, predicted: NDArray) -> float:
    return score_labels(task, predicted.tolist(), rows.golds.tolist())


def _server_flags(rest: Sequence[str]) -> argparse.Namespace:
    """Those flags of `serve` on which a decision depends. Raises RaeeError for any other."""
    parser = argparse.ArgumentParser("raee-serve eval --offline", allow_abbrev=False)
    parser.add_argument("--max-distance", type=float)
    parser.add_argument("--encoder")
    parser.add_argument("--shortcuts-file")
    parser.add_argument("--exit-points", default="any")
    own, other = parser.parse_known_args(rest)
    if other:
        raise RaeeError(f"{' '.join(other)} is for a server, which --offline does without")
    return own


def _check(tasks: Sequence[Task], metadata: TableMetadata, uri: str) -> None:
    """Raises TaskError or BindingError for a task that the table cannot answer."""
    for task in tasks:
        built = metadata.built.get(task.name)
        if built is None:
            known = ", ".join(metadata.built)
            raise TaskError(f"task {task.name} is not in {uri}; those are: {known}")
        metadata.check_task(task, uri)
        entry = metadata.tasks[task.name]
        if entry.kind == "labels" and built.no_fit and not entry.plain_token_ids:
            raise TaskError(
                f"task {task.name} has no probes ({built.no_fit}), and its labels share first "
                "tokens: nothing answers it"
            )
