"""Whether retrieved exits still help once the backbone was fine-tuned for the task."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp

from raee_serve.evaluation.baselines import Answers, baselines
from raee_serve.evaluation.offline import answers
from raee_serve.evaluation.probed import KnownVectors, ProbeCache
from raee_serve.evaluation.run import shuffled_rows
from raee_serve.evaluation.suite.findings import Findings, Row
from raee_serve.evaluation.suite.finetuning import EXAMPLES, RANK, TARGETS, finetuned
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.scores import averaged
from raee_serve.fingerprint import identify_backbone
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.table.build import TaskBuilder
from raee_serve.table.datasets import load_examples
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
    rows: list[Row] = []
    for name, checkpoint in (("as it was", material.checkpoint), ("fine-tuned", tuned)):
        for way, own in _answers(material, task, checkpoint, folder / name).items():
            rows.append({"backbone": name, "way": way, **averaged(material, {task.name: own})})
    notes = [
        f"Task {task.name}; LoRA of rank {RANK} on {' and '.join(TARGETS)}, one pass over up to "
        f"{EXAMPLES} training prompts; tables of up to {ROWS} training prompts, which the "
        f"fine-tuned backbone has partly been trained on; up to {PROMPTS} test prompts."
    ]
    return Findings(rows, notes=notes)


def _answers(material: Material, task: Task, checkpoint: Path, folder: Path) -> dict[str, Answers]:
    """By rule, then the baselines, with a table of this checkpoint's own."""
    source, name = material.source, material.table.metadata.encoder.name
    encoder, backbone = Encoder(name, threads=2), identify_backbone(checkpoint)
    metadata = TableMetadata(backbone, encoder.identity())
    table = ExitTable.open_or_create(str(folder / "table"), metadata)
    train = load_examples(task, "train", source.data)
    TaskBuilder(task, table, LayerProbe(checkpoint), encoder).build(train[:ROWS])
    prompts = shuffled_rows(task, source.data, source.limit, source.seed)[:PROMPTS]
    probes = ProbeCache(checkpoint, backbone, metadata.encoder, name, folder / "test-rows")
    asked = probes.of(task, prompts)
    known = KnownVectors(metadata.encoder, [asked])
    retriever = ExitRetriever.open(table.uri, backbone=backbone, encoder=known)
    ways = {rule: answers(retriever, task, asked, rule, None) for rule in RULES}
    return ways | baselines(table.rows(task.name), asked)
