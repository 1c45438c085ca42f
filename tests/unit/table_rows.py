"""Rows and metadata for small tables."""

import json
from dataclasses import asdict

import numpy as np

from raee_serve.fingerprint import BackboneIdentity
from raee_serve.table.schema import EncoderIdentity, TableMetadata, TaskEntry, TaskRows
from raee_serve.table.tasks import get_task

BACKBONE = BackboneIdentity("LlamaForCausalLM", 4, "ab" * 32)
ENCODER = EncoderIdentity("minilm", 8, "cd" * 32)


def metadata(encoder: EncoderIdentity = ENCODER) -> TableMetadata:
    return TableMetadata(BACKBONE, encoder)


def format_1_json(held: TableMetadata) -> str:
    """Metadata as tables of format 1 had them, where tasks had no shelves."""
    raw = asdict(held) | {"format": 1}
    for task in raw["tasks"].values():
        del task["shelf"]
    return json.dumps(raw)


def entry(name: str) -> TaskEntry:
    task = get_task(name)
    layers = (1, 2, 3, 4) if task.kind == "labels" else (2, 4)
    return TaskEntry.of(task, tuple(range(10, 10 + len(task.label_words))), layers)


def label_rows(ids: list[str], vectors=None, right=None, golds=None) -> TaskRows:
    """Rows of a two-label task. right: [n, 4] probability of gold by layer, default 0.8."""
    n = len(ids)
    golds = np.arange(n) % 2 if golds is None else np.array(golds)
    p_gold = np.full((n, 4), 0.8) if right is None else np.array(right, float)
    p = np.where(np.arange(2) == golds[:, None, None], p_gold[..., None], 1 - p_gold[..., None])
    return TaskRows(
        ids,
        unit_vectors(n) if vectors is None else vectors,
        golds.astype(np.int32),
        label_logprobs=np.log(p).astype(np.float32),
    )


def unit_vectors(n: int, dimension: int = 8, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
