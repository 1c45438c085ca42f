"""Rows, fits and metadata for small tables, without a backbone or an encoder."""

import hashlib
from collections.abc import Sequence

import numpy as np

from raee_serve.exits.fit import TaskFit
from raee_serve.exits.probes import Probe
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.table.build import Finished, complete
from raee_serve.table.schema import Built, EncoderIdentity, TableMetadata, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.tasks.registry import get_task

LAYERS, HIDDEN = (1, 2, 3, 4), 16
BACKBONE = BackboneIdentity("LlamaForCausalLM", len(LAYERS), "ab" * 32)
ENCODER = EncoderIdentity("minilm", 8, "cd" * 32)


def metadata(encoder: EncoderIdentity = ENCODER) -> TableMetadata:
    return TableMetadata(BACKBONE, encoder)


def entry(name: str) -> TaskEntry:
    task = get_task(name)
    layers = LAYERS if task.kind == "labels" else (2, 4)
    return TaskEntry.of(task, tuple(range(10, 10 + len(task.labels))), layers)


def row_ids(n: int, seed: str = "") -> list[str]:
    """Ids as examples have them, which fits need."""
    return [hashlib.sha256(f"{seed}{i}".encode()).hexdigest()[:32] for i in range(n)]


def label_rows(ids: Sequence[str], vectors=None, right=None, golds=None, states=None) -> TaskRows:
    """Rows of a two-label task. right: [n, 4] probability of gold by the plain head after each
    layer, default 0.8. states: [n, 4, hidden_size], none by default."""
    n = len(ids)
    golds = np.arange(n) % 2 if golds is None else np.array(golds)
    p_gold = np.full((n, len(LAYERS)), 0.8) if right is None else np.array(right, float)
    p_gold = p_gold.reshape(n, len(LAYERS))
    p = np.where(np.arange(2) == golds[:, None], p_gold[:, -1:], 1 - p_gold[:, -1:])
    return TaskRows(
        list(ids),
        unit_vectors(n) if vectors is None else vectors,
        golds.astype(np.int32),
        plain_probs=np.where(p_gold > 0.5, p_gold, 0).astype(np.float32),
        full_logprobs=np.log(np.maximum(p, 1e-6)).astype(np.float32),
        states=None if states is None else states.astype(np.float16),
    )


def states_for(golds: np.ndarray, layer: int = 2, seed: int = 0) -> np.ndarray:
    """[n, 4, HIDDEN] states of rows with these labels, which tell two labels apart from `layer`
    on."""
    states = np.random.default_rng(seed).normal(size=(len(golds), len(LAYERS), HIDDEN))
    states[:, layer - 1 :, 0] += 8 * np.asarray(golds)[:, None]
    return states


def fitting_rows(n: int = 60, *, layer: int = 2, seed: str = "", vectors=None) -> TaskRows:
    """Rows that probes can be fitted to."""
    golds = np.arange(n) % 2
    states = states_for(golds, layer, sum(seed.encode()))
    return label_rows(row_ids(n, seed), vectors, golds=golds, states=states)


def add_all(table: ExitTable, name: str, rows: TaskRows) -> Finished:
    """As a build does that makes these rows."""
    table.put_task(entry(name))
    table.add(name, rows)
    return complete(table, name, progress=False)


def replace_all(table: ExitTable, own: TaskEntry, rows: TaskRows) -> Finished:
    """As a build does that puts these rows in the place of the task's."""
    table.begin_replace(own)
    table.add(own.name, rows)
    return complete(table, own.name, rows.ids, progress=False)


def made_fit(ids: Sequence[str], exit_probs, *, labels: int = 2, certainties=None, **parts):
    """A fit that says what it is told to: its probes and front end prefer no label.

    exit_probs: [n, layers]. parts: of `TaskFit`, instead of what stands here.
    """
    exit_probs = np.array(exit_probs, np.float32)
    n, dimension = len(exit_probs), parts.pop("dimension", 384)
    layers = parts.pop("layers", LAYERS)

    def silent(width: int) -> Probe:
        return Probe(np.zeros((labels, width), np.float32), np.zeros(labels, np.float32))

    own = {
        "probes": tuple(silent(HIDDEN) for _ in layers),
        "alone": silent(HIDDEN),
        "encoder": silent(dimension),
        "encoder_weights": np.ones(len(layers) + 1, np.float32),
        "vote_weights": np.zeros(len(layers) + 1, np.float32),
        "is_right": exit_probs > 0.5,
        "certainties": np.full(n, 0.5, np.float32) if certainties is None else certainties,
    }
    return TaskFit(layers, ids=tuple(ids), exit_probs=exit_probs, **(own | parts))


def put_fit(table: ExitTable, name: str, rows: TaskRows, fit: TaskFit | None) -> None:
    """A finished task with this fit; None for one whose rows allow none."""
    table.put_task(entry(name))
    table.add(name, rows)
    table.finish(name, Built(len(rows), "" if fit else "it is a test"), fit)


def unit_vectors(n: int, dimension: int = 8, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
