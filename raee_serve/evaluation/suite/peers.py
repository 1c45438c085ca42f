"""Retrieved exits beside other ways to run fewer layers, on the same prompts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from raee_serve.evaluation.baselines import Answers
from raee_serve.evaluation.suite.backbone import StudiedBackbone
from raee_serve.evaluation.suite.findings import Findings, Picture, Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.scores import averaged, decided
from raee_serve.retrieval.heads import calibrated
from raee_serve.table.datasets import load_examples
from raee_serve.table.schema import row_id
from raee_serve.table.task import Task, prompt_token_ids

QUESTION = "Do retrieved exits beat other ways to run as few layers?"
FRACTIONS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.7)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
DROPPED = (0.1, 0.2, 0.3, 0.5)
"""Shares of the layers that are dropped."""
ROWS, PROMPTS = 200, 200
"""A task's table rows and prompts that are run with layers dropped."""
BATCH = 16

Way = dict[str, Answers]


def run(material: Material) -> Findings:
    rows: list[Row] = []
    for rule in ("stacked", "earliest"):
        for fraction in FRACTIONS:
            way = decided(material, material.retriever(fraction=fraction), rule)
            rows.append(_line(material, f"retrieved, {rule}", fraction, way))
    free = {task.name: _calibrated(material, task) for task in material.tasks}
    num_layers = material.backbone.num_layers
    for layer in range(1, num_layers + 1):
        way = {
            name: Answers(scores[:, layer - 1].argmax(axis=1), layer / num_layers)
            for name, scores in free.items()
        }
        rows.append(_line(material, "one layer for all, calibrated", layer, way))
    for threshold in THRESHOLDS:
        way = {name: confident(scores, threshold) for name, scores in free.items()}
        rows.append(_line(material, "confidence threshold, calibrated", threshold, way))
    rows += _dropping(material)
    notes = [
        "confidence threshold: exit after the first layer whose most probable label word has that "
        "probability (CALM's softmax response, arXiv 2207.07061), on label words alone and with "
        "the same calibration as a fixed layer; what a served engine would pay to look after every "
        "layer is not counted.",
        f"layers dropped: those of least block influence (ShortGPT) over {ROWS} table rows a task, "
        f"calibrated on these; {PROMPTS} prompts a task.",
    ]
    return Findings(rows, Picture("depth", "accuracy", "way", ("low", "high")), notes)


def confident(scores: NDArray[np.floating], threshold: float) -> Answers:
    """[n, num_layers, num_labels] scores: the first layer that is sure enough, or the last."""
    shifted = np.exp(scores - scores.max(axis=2, keepdims=True))
    sure = shifted.max(axis=2) / shifted.sum(axis=2) >= threshold
    sure[:, -1] = True
    layers = sure.argmax(axis=1)
    chosen = scores[np.arange(len(scores)), layers]
    return Answers(chosen.argmax(axis=1), float((layers + 1).mean() / scores.shape[1]))


def _line(material: Material, way: str, setting: float, answers: Way) -> Row:
    return {"way": way, "setting": setting, **averaged(material, answers)}


def _calibrated(material: Material, task: Task) -> NDArray[np.float64]:
    """The prompts' scores, freed of the layers' own leanings as the table's rows tell them."""
    rows = material.rows(task)
    assert rows.label_logprobs is not None
    return material.asked(task).label_logprobs - calibrated(rows.label_logprobs).bias


def _dropping(material: Material) -> list[Row]:
    backbone = StudiedBackbone(material.checkpoint)
    tokens = {task.name: _token_ids(material, task, backbone) for task in material.tasks}
    influence = np.mean(
        [
            backbone.block_influence(rows[first : first + BATCH])
            for rows, _ in tokens.values()
            for first in range(0, len(rows), BATCH)
        ],
        axis=0,
    )
    least = 1 + np.argsort(influence)
    lines: list[Row] = []
    for share in tqdm(DROPPED, desc="layers dropped", unit="share"):
        dropped = least[: max(1, round(share * backbone.num_layers))].tolist()
        way = {}
        with backbone.without(dropped):
            for task in material.tasks:
                rows, prompts = (
                    _last_scores(material, backbone, task, part) for part in tokens[task.name]
                )
                scores = prompts - calibrated(rows[:, None]).bias[0]
                way[task.name] = Answers(
                    scores.argmax(axis=1), 1 - len(dropped) / material.backbone.num_layers
                )
        lines.append(_line(material, "layers dropped by block influence", len(dropped), way))
    return lines


def _token_ids(
    material: Material, task: Task, backbone: StudiedBackbone
) -> tuple[list[list[int]], list[list[int]]]:
    """Of table rows, whose texts are found again by their ids, and of prompts."""
    examples = load_examples(task, "train", material.source.data)
    wanted = set(material.some_rows(task, ROWS).ids)
    texts = [e.text for e in examples if row_id(task.name, e.text, e.gold) in wanted]
    parts = (texts[:ROWS], material.asked(task).texts[:PROMPTS])
    rows, prompts = (
        [prompt_token_ids(backbone.tokenizer, task.render(text)) for text in part] for part in parts
    )
    return rows, prompts


def _last_scores(
    material: Material, backbone: StudiedBackbone, task: Task, prompts: list[list[int]]
) -> NDArray[np.float32]:
    """[n, num_labels] of the last layer that is left."""
    ids = material.table.metadata.tasks[task.name].label_token_ids
    parts = [
        backbone.label_logprobs(prompts[first : first + BATCH], ids)[:, -1]
        for first in range(0, len(prompts), BATCH)
    ]
    return np.concatenate(parts)
