"""All rules on all tasks, beside what needs no decision, and beside what the paper reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from raee_serve.evaluation.baselines import Answers, baselines
from raee_serve.evaluation.paired import compare, compare_scores
from raee_serve.evaluation.suite.findings import Findings, Picture, Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.scores import averaged, by_task, decided, tasks_averaged
from raee_serve.evaluation.suite.serving import (
    CONCURRENCY,
    System,
    Timed,
    Way,
    in_turns,
    predicted,
    raee_system,
    speed,
)
from raee_serve.evaluation.suite.summarised import Documents, settings
from raee_serve.evaluation.summaries import BUDGETS
from raee_serve.evaluation.summary_report import published
from raee_serve.evaluation.summary_turns import FULL_DEPTH, rows_of
from raee_serve.retrieval.aggregate import RULES
from raee_serve.retrieval.free_text import quality_choice
from raee_serve.retrieval.leave_one_out import LABEL_VOTE
from raee_serve.table.task import Task

QUESTION = "What do the rules make of the tasks, and what do answers cost that need no rule?"

REPORTED: dict[str, dict[str, float]] = {
    "paper: Llama-3-8B, RAEE": {
        "sst2": 73.05,
        "sst5": 35.25,
        "mr": 66.45,
        "cr": 57.95,
        "mpqa": 75.05,
        "subj": 90.05,
        "trec": 51.80,
        "cola": 9.55,
    }
}
"""Percent, arXiv 2405.15198; other prompts' wording, all of each test set. Its mean of the eight is
57.39, Llama-3-8B's at full depth 41.80."""
REPORTED_ROUGE_L = "paper: RAEE, summaries"
SUMMARIES = "summaries, "
"""How the ways of summaries are named, before what `rows_of` calls them."""


def run(material: Material) -> Findings:
    """Accuracy from probed rows; with `served` or `documents`, what a server adds to it."""
    retriever = material.retriever()
    ways = {rule: decided(material, retriever, rule) for rule in RULES}
    beside = {
        task.name: baselines(material.rows(task), material.asked(task)) for task in material.tasks
    }
    for name in beside[material.tasks[0].name]:
        ways[name] = {task: own[name] for task, own in beside.items()}
    golds = {task.name: material.asked(task).golds for task in tasks_averaged(material.tasks)}
    right = {
        way: [answers[task].predicted == gold for task, gold in golds.items()]
        for way, answers in ways.items()
    }
    rows: list[Row] = [
        {"way": way, **by_task(material, answers), **averaged(material, answers)}
        for way, answers in ways.items()
    ]
    notes = [
        f"{rule} against {LABEL_VOTE}, in accuracy over {', '.join(golds)}, paired: "
        f"{compare(right[rule], right[LABEL_VOTE])}"
        for rule in RULES
    ]
    documents = Documents.of(material)
    if material.source.served or documents.texts:
        with raee_system(material.source.model, material.source.table) as system:
            if material.source.served:
                measured = _measured(material, system, ways)
                rows = [{**row, **measured.get(str(row["way"]), {})} for row in rows]
                notes.append(SERVED_NOTE)
            if documents.texts:
                summaries, compared = _summarised(material, system, documents)
                rows, notes = [*rows, *summaries], [*notes, *compared, DOCUMENTS_NOTE]
    return Findings(
        [*rows, *_reported(material)],
        Picture("depth", "accuracy", "way"),
        notes,
        [Picture("speed", "accuracy", "way")] if material.source.served else [],
    )


DOCUMENTS_NOTE = (
    "Summaries: full depth and all budgets on the same documents, which the first budget alone has "
    "to embed."
)
SERVED_NOTE = (
    f"requests/s: {CONCURRENCY} under way at once, retrieval included; each rule is asked about "
    "another share of the prompts, for the server remembers the vectors of texts; speed: over that "
    "of full depth on the same prompts, in turns; latency ms: median of prompts asked one at a "
    "time; as offline: share of the served answers that are those the row's accuracy counts."
)


def _measured(
    material: Material, system: System, ways: Mapping[str, Mapping[str, Answers]]
) -> dict[str, Row]:
    """Speed of each rule and, over all of their prompts, of full depth."""
    whole = Way(system, {"exit_layer": "full"})
    found: dict[str, Row] = {}
    at_full_depth: dict[str, Timed] = {}
    for position, rule in enumerate(RULES):
        share = slice(position, material.source.served, len(RULES))
        prompts = {task: material.asked(task).texts[share] for task in material.tasks}
        full, own = in_turns([whole, Way(system, {"rule": rule})], prompts)
        found[rule] = speed(own, full) | {"as offline": _agreement(own, ways[rule], prompts, share)}
        at_full_depth |= {f"{task}, {rule}": timed for task, timed in full.items()}
        print(f"raee-serve: paper: {rule} served", flush=True)
    found[FULL_DEPTH.name] = speed(at_full_depth, at_full_depth)
    return found


def _agreement(
    own: Mapping[str, Timed],
    offline: Mapping[str, Answers],
    prompts: Mapping[Task, Sequence[str]],
    share: slice,
) -> float:
    same = [
        predicted(task, own[task.name].answers) == offline[task.name].predicted[share]
        for task in prompts
    ]
    return round(float(np.concatenate(same).mean()), 4)


def _summarised(
    material: Material, system: System, documents: Documents
) -> tuple[list[Row], list[str]]:
    """Full depth and the budgets on the free-text tasks, and how they compare."""
    asked = rows_of([], {budget: quality_choice(budget) for budget in BUDGETS})
    ways = [Way(system, row.raee, settings) for row in asked]
    full, *_ = timed = in_turns(ways, documents.texts)
    rows: list[Row] = []
    notes: list[str] = []
    theirs = documents.rouge_l(full)
    for row, own in zip(asked, timed, strict=True):
        depths = [part.depth for part in own.values()]
        figures = documents.scored(own, depths) | speed(own, full)
        rows.append({"way": SUMMARIES + row.name, **figures})
        notes += [
            f"{SUMMARIES}{row.name} against full depth, ROUGE-L of {task}, paired: "
            f"{compare_scores(scores, theirs[task])}"
            for task, scores in documents.rouge_l(own).items()
            if row is not asked[0]
        ]
    paper = {task.name: published(task.name) for task in material.summaries}
    reported = {task: value for task, value in paper.items() if value is not None}
    if reported:
        rows.append({"way": REPORTED_ROUGE_L, **reported})
    return rows, notes


def _reported(material: Material) -> list[Row]:
    lines: list[Row] = []
    for name, percent in REPORTED.items():
        own = {t.name: round(percent[t.name] / 100, 4) for t in material.tasks if t.name in percent}
        if own:
            mean = round(float(np.mean([v for task, v in own.items() if task != "cola"] or [0])), 4)
            lines.append({"way": name, **own, "accuracy": mean})
    return lines
