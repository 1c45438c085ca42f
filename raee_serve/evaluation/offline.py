"""`raee-serve eval --offline`: what the rules make of a task's test rows, without a server.

Each test row is probed once; decisions are made by the server's own retriever, and an answer is
the best label word after the decided layer with the decision's biases added, as in the server.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raee_serve.checkpoints import local_checkpoint
from raee_serve.errors import RaeeError, TaskError
from raee_serve.evaluation.baselines import Answers, baselines
from raee_serve.evaluation.offline_report import as_json, as_tables
from raee_serve.evaluation.probed import KnownVectors, ProbeCache, ProbedTask
from raee_serve.fingerprint import identify_backbone
from raee_serve.retrieval.aggregate import RULES, rule_named
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.points_command import points_named
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.server.settings import DepthSettings
from raee_serve.shortcuts import stored_shortcuts
from raee_serve.table.datasets import Example
from raee_serve.table.schema import TableMetadata
from raee_serve.table.store import ExitTable
from raee_serve.table.task import Task

STORED = "stored"
"""Stands for each task's own choice, as `calibrate` stored it."""
AT_ONCE = 256
"""Prompts looked up together."""


@dataclass(frozen=True, slots=True)
class TaskAnswers:
    """Answers to one task's test rows. golds: [n]; ways: by rule, then the baselines by name."""

    task: Task
    golds: NDArray[np.int32]
    rules: dict[str, Answers]
    baselines: dict[str, Answers]


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
    points = own.pop("exit_points")
    settings = DepthSettings(table=args.table, k=args.k, **own)
    metadata = ExitTable.open(args.table).metadata
    _check(tasks, metadata, args.table)
    rules = args.rule or [*RULES, *([STORED] if metadata.choices else [])]
    for rule in rules:
        if rule != STORED:
            rule_named(rule)
    settings = replace(settings, exit_points=points_named(points, args.table))
    results = list(evaluate(args.model, settings, tasks, examples, rules))
    print(as_tables(results))
    print(as_json(results), flush=True)


def evaluate(
    model: str,
    settings: DepthSettings,
    tasks: Sequence[Task],
    examples: Mapping[str, Sequence[Example]],
    rules: Sequence[str],
) -> Iterator[TaskAnswers]:
    """The answers to each task, in order; `rules` count, not `settings.rule`."""
    assert settings.table is not None
    table = ExitTable.open(settings.table)
    checkpoint = local_checkpoint(model)
    backbone = identify_backbone(checkpoint)
    table.metadata.check_backbone(backbone, table.uri)
    encoder = table.metadata.encoder
    probed = ProbeCache(checkpoint, backbone, encoder, settings.encoder or encoder.name)
    asked = {task.name: probed.of(task, examples[task.name]) for task in tasks}
    retriever = ExitRetriever.open(
        settings.table,
        backbone=backbone,
        encoder=KnownVectors(encoder, list(asked.values())),
        max_distance=settings.max_distance,
        fraction=settings.fraction,
        vote_weight=settings.vote_weight,
        exit_points=settings.exit_points,
        shortcuts=stored_shortcuts(settings.table, settings.shortcuts_file, backbone),
    )
    for task in tasks:
        prompts = asked[task.name]
        decided = {rule: answers(retriever, task, prompts, rule, settings.k) for rule in rules}
        beside = baselines(table.rows(task.name), prompts)
        yield TaskAnswers(task, prompts.golds, decided, beside)


def answers(
    retriever: ExitRetriever, task: Task, asked: ProbedTask, rule: str, k: int | None
) -> Answers:
    """What the server would answer under a rule."""
    lookups = [
        Lookup((task.name,), text, k=k, rule=None if rule == STORED else rule)
        for text in asked.texts
    ]
    decisions = [
        decision
        for start in range(0, len(lookups), AT_ONCE)
        for decision in retriever.decide(lookups[start : start + AT_ONCE])
    ]
    layers = np.array([decision.exit_layer for decision in decisions])
    scores = asked.label_logprobs[np.arange(len(layers)), layers - 1].astype(np.float64)
    for own, decision in zip(scores, decisions, strict=True):
        if decision.label_bias:
            own += decision.label_bias
    return Answers(
        scores.argmax(axis=1),
        float(layers.mean() / retriever.num_layers),
        Counter(decision.reason.value for decision in decisions),
    )


def _server_flags(rest: Sequence[str]) -> argparse.Namespace:
    """Those flags of `serve` on which a decision depends. Raises RaeeError for any other."""
    parser = argparse.ArgumentParser("raee-serve eval --offline", allow_abbrev=False)
    parser.add_argument("--fraction", type=float)
    parser.add_argument("--vote-weight", type=float)
    parser.add_argument("--max-distance", type=float)
    parser.add_argument("--encoder")
    parser.add_argument("--exit-points", default="any")
    own, other = parser.parse_known_args(rest)
    if other:
        raise RaeeError(f"{' '.join(other)} is for a server, which --offline does without")
    return own


def _check(tasks: Sequence[Task], metadata: TableMetadata, uri: str) -> None:
    for task in tasks:
        if task.kind != "labels":
            raise TaskError(f"task {task.name} has free text for an answer: evaluate it served")
        if task.name not in metadata.tasks:
            raise TaskError(
                f"task {task.name} is not in {uri}; those are: {', '.join(metadata.tasks)}"
            )
        metadata.check_task(task, uri)
