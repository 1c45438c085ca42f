"""Retrieved exits beside other ways to run fewer layers, on the same prompts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from raee_serve.evaluation.baselines import Answers
from raee_serve.evaluation.suite import peer_speed
from raee_serve.evaluation.suite.dropping import PROMPTS, ROWS, LayerDropping
from raee_serve.evaluation.suite.findings import Findings, Picture, Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.scores import averaged, decided
from raee_serve.retrieval.heads import calibrated
from raee_serve.table.task import Task

QUESTION = "Do retrieved exits beat other ways to run as few layers, or to run faster?"
FRACTIONS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.7)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
DROPPED = (0.1, 0.2, 0.3, 0.5)
"""Shares of the layers that are dropped."""

Way = dict[str, Answers]


def run(material: Material) -> Findings:
    """Accuracy and depth from probed rows; with `served` or `documents`, speed from servers."""
    rows = _retrieved(material)
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
    dropping = LayerDropping(material)
    for share in tqdm(DROPPED, desc="layers dropped", unit="share"):
        dropped = max(1, round(share * num_layers))
        way = dropping.answers(dropped)
        rows.append(_line(material, "layers dropped by block influence", dropped, way))
    notes = [
        "confidence threshold: exit after the first layer whose most probable label word has that "
        "probability (CALM's softmax response, arXiv 2207.07061), on label words alone and with "
        "the same calibration as a fixed layer. Its layers are counted, not run: no speed is known "
        "of it, and what a served engine would pay to look after every layer is not counted.",
        f"layers dropped: those of least block influence (ShortGPT) over {ROWS} table rows a task, "
        f"calibrated on these; {PROMPTS} prompts a task.",
    ]
    measured, told = peer_speed.measured(material, dropping)
    beside = [
        Picture("speed", quality, "way")
        for quality in ("accuracy", "ROUGE-L")
        if any(quality in row for row in measured)
    ]
    picture = Picture("depth", "accuracy", "way", ("low", "high"))
    return Findings([*rows, *measured], picture, [*notes, *told], beside)


def confident(scores: NDArray[np.floating], threshold: float) -> Answers:
    """[n, num_layers, num_labels] scores: the first layer that is sure enough, or the last."""
    shifted = np.exp(scores - scores.max(axis=2, keepdims=True))
    sure = shifted.max(axis=2) / shifted.sum(axis=2) >= threshold
    sure[:, -1] = True
    layers = sure.argmax(axis=1)
    chosen = scores[np.arange(len(scores)), layers]
    return Answers(chosen.argmax(axis=1), float((layers + 1).mean() / scores.shape[1]))


def _retrieved(material: Material) -> list[Row]:
    rows: dict[str, list[Row]] = {"stacked": [], "earliest": []}
    for fraction in FRACTIONS:
        retriever = material.retriever(fraction=fraction)
        for rule, own in rows.items():
            way = decided(material, retriever, rule)
            own.append(_line(material, f"retrieved, {rule}", fraction, way))
    return [row for own in rows.values() for row in own]


def _line(material: Material, way: str, setting: float, answers: Way) -> Row:
    return {"way": way, "setting": setting, **averaged(material, answers)}


def _calibrated(material: Material, task: Task) -> NDArray[np.float64]:
    """The prompts' scores, freed of the layers' own leanings as the table's rows tell them."""
    rows = material.rows(task)
    assert rows.label_logprobs is not None
    return material.asked(task).label_logprobs - calibrated(rows.label_logprobs).bias
