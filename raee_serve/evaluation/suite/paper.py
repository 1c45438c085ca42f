"""All rules on all tasks, beside what needs no decision, and beside what the paper reports."""

from __future__ import annotations

import numpy as np

from raee_serve.evaluation.baselines import baselines
from raee_serve.evaluation.paired import compare
from raee_serve.evaluation.suite.findings import Findings, Picture, Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.scores import averaged, by_task, decided
from raee_serve.retrieval.aggregate import RULES
from raee_serve.retrieval.leave_one_out import LABEL_VOTE

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


def run(material: Material) -> Findings:
    retriever = material.retriever()
    ways = {rule: decided(material, retriever, rule) for rule in RULES}
    beside = {
        task.name: baselines(material.rows(task), material.asked(task)) for task in material.tasks
    }
    for name in beside[material.tasks[0].name]:
        ways[name] = {task: own[name] for task, own in beside.items()}
    golds = {task.name: material.asked(task).golds for task in material.tasks}
    right = {
        way: [answers[task].predicted == gold for task, gold in golds.items()]
        for way, answers in ways.items()
    }
    rows: list[Row] = [
        {"way": way, **by_task(material, answers), **averaged(material, answers)}
        for way, answers in ways.items()
    ]
    notes = [
        f"{rule} against {LABEL_VOTE}, in accuracy over all tasks, paired: "
        f"{compare(right[rule], right[LABEL_VOTE])}"
        for rule in RULES
    ]
    return Findings([*rows, *_reported(material)], Picture("depth", "accuracy", "way"), notes)


def _reported(material: Material) -> list[Row]:
    lines: list[Row] = []
    for name, percent in REPORTED.items():
        own = {t.name: round(percent[t.name] / 100, 4) for t in material.tasks if t.name in percent}
        if own:
            mean = round(float(np.mean([v for task, v in own.items() if task != "cola"] or [0])), 4)
            lines.append({"way": name, **own, "accuracy": mean})
    return lines
