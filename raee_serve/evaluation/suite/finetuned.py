"""Whether retrieved exits still help once the backbone was fine-tuned for the task."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

from raee_serve.evaluation.baselines import Answers, baselines
from raee_serve.evaluation.suite.findings import Findings, Picture, Row
from raee_serve.evaluation.suite.finetuning import EXAMPLES, RANK, TARGETS, finetuned
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.scores import averaged, decided
from raee_serve.fingerprint import identify_backbone
from raee_serve.retrieval.encoder import Encoder
from raee_serve.table.build import TaskBuilder
from raee_serve.table.datasets import Example, load_examples
from raee_serve.table.probe import LayerProbe
from raee_serve.table.schema import TableMetadata
from raee_serve.table.store import ExitTable
from raee_serve.table.task import Task

QUESTION = "Do retrieved exits still help after fine-tuning?"
RULES = ("published", "earliest", "stacked")
ROWS, PROMPTS = 1000, 400
PREFERRED = "sst2"
"""The task, where it is among those asked for; else the first of them."""


def run(material: Material) -> Findings:
    source = material.source
    task = next((t for t in material.tasks if t.name == PREFERRED), material.tasks[0])
    folder = Path(mkdtemp(dir=source.scratch))
    train = load_examples(task, "train", source.data)
    tuned = finetuned(material.checkpoint, task, train, source.seed, folder / "tuned")
    drawn = random.Random(source.seed).sample(train, min(ROWS, len(train)))
    rows: list[Row] = []
    for name, checkpoint in (("as it was", material.checkpoint), ("fine-tuned", tuned)):
        own = _material(material, task, checkpoint, drawn, folder / name)
        for way, answers in _answers(own, task).items():
            rows.append({"backbone": name, "way": way, **averaged(own, {task.name: answers})})
    notes = [
        f"Task {task.name}; LoRA of rank {RANK} on {' and '.join(TARGETS)}, one pass over up to "
        f"{EXAMPLES} training prompts; tables of up to {ROWS} training prompts, drawn at random, "
        f"which the fine-tuned backbone has partly been trained on; up to {PROMPTS} test prompts."
    ]
    picture = Picture("depth", "accuracy", "way", ("low", "high"), joined=False)
    return Findings(rows, picture, notes)


def _material(
    material: Material, task: Task, checkpoint: Path, train: list[Example], folder: Path
) -> Material:
    """The same task and test rows with another checkpoint, and a table of that one's own."""
    source, name = material.source, material.table.metadata.encoder.name
    encoder = Encoder(name, threads=2)
    metadata = TableMetadata(identify_backbone(checkpoint), encoder.identity())
    table = ExitTable.open_or_create(str(folder / "table"), metadata)
    TaskBuilder(task, table, LayerProbe(checkpoint), encoder).build(train)
    limit = PROMPTS if source.limit is None else min(source.limit, PROMPTS)
    own = replace(source, model=str(checkpoint), table=table.uri, limit=limit)
    return Material.of(own, [task.name], folder / "test-rows")


def _answers(own: Material, task: Task) -> dict[str, Answers]:
    """By rule, then the baselines."""
    retriever = own.retriever()
    ways = {rule: decided(own, retriever, rule)[task.name] for rule in RULES}
    return ways | baselines(own.rows(task), own.asked(task))
