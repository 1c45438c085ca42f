"""How large a table has to be."""

from __future__ import annotations

from tqdm import tqdm

from raee_serve.evaluation.baselines import baselines
from raee_serve.evaluation.suite.findings import Findings, Picture, Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.scores import averaged, decided
from raee_serve.retrieval.leave_one_out import LABEL_VOTE

QUESTION = "How many labelled prompts a task does a table need?"
SIZES = (50, 100, 250, 500, 1000, 2000, 4000)
RULES = ("published", "earliest", "stacked")


def run(material: Material) -> Findings:
    most = max(len(material.rows(task)) for task in material.tasks)
    rows: list[Row] = []
    for size in tqdm([*(s for s in SIZES if s < most), most], desc="size", unit="table"):
        parts = {task.name: material.some_rows(task, size) for task in material.tasks}
        retriever = material.retriever(parts)
        ways = {rule: decided(material, retriever, rule) for rule in RULES}
        ways[LABEL_VOTE] = {
            task.name: baselines(parts[task.name], material.asked(task))[LABEL_VOTE]
            for task in material.tasks
        }
        rows += [
            {"way": way, "rows a task": size, **averaged(material, answers)}
            for way, answers in ways.items()
        ]
    return Findings(
        rows,
        Picture("rows a task", "accuracy", "way", ("low", "high"), log=True),
        ["A task with fewer rows than the size has all of its rows in the table."],
    )
