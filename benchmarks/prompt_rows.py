"""Exit tables of any size from real embeddings of real prompts; what their rows say is drawn."""

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import TaskError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.retrieval.encoder import Encoder
from raee_serve.table.datasets import Split, load_examples
from raee_serve.table.schema import TableMetadata, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.table.tasks import get_task

SOURCES = ("cr", "mpqa", "mr", "sst2", "sst5", "subj", "trec")
TASK = "sst2"
"""Whose rows the prompts of all sources are made."""
NUM_LAYERS = 18
BACKBONE = BackboneIdentity("Gemma3ForCausalLM", NUM_LAYERS, "00" * 32)
JITTER = 0.3
"""Length of the random vector that makes a further row of a real one, which has length 1."""
AT_ONCE = 50_000


def texts(split: Split, limit: int, root: str) -> list[str]:
    """Up to `limit` different prompts, shuffled; of the demo task where there is no data."""
    names = SOURCES
    try:
        found = [e.text for name in names for e in load_examples(get_task(name), split, root)]
    except TaskError:
        found = [e.text for e in load_examples(get_task("demo_sentiment"), split)]
    unique = sorted(set(found))
    random.Random(0).shuffle(unique)
    return unique[:limit]


def jittered(vectors: NDArray[np.float32], num_rows: int, seed: int) -> NDArray[np.float32]:
    """[num_rows, dimension] unit vectors: seeded picks of `vectors`, each moved by JITTER."""
    rng = np.random.default_rng(seed)
    rows = vectors[rng.integers(0, len(vectors), num_rows)]
    noise = rng.standard_normal(rows.shape, np.float32)
    noise *= JITTER / np.linalg.norm(noise, axis=1, keepdims=True)
    rows = rows + noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_table(uri: str, encoder: Encoder, prompts: Sequence[str], num_rows: int) -> ExitTable:
    """A table of one task: the prompts' own vectors, as many as there are, then jittered ones."""
    task = get_task(TASK)
    table = ExitTable.open_or_create(uri, TableMetadata(BACKBONE, encoder.identity()))
    table.put_task(TaskEntry.of(task, (10, 11), tuple(range(1, NUM_LAYERS + 1))))
    own = encoder.encode(prompts[:num_rows])
    for start in range(0, num_rows, AT_ONCE):
        n = min(AT_ONCE, num_rows - start)
        real = own if start == 0 else own[:0]
        vectors = np.concatenate([real, jittered(own, n - len(real), seed=start)])
        table.add(TASK, _drawn(start, vectors))
    return table


def _drawn(start: int, vectors: NDArray[np.float32]) -> TaskRows:
    rng = np.random.default_rng(start + 1)
    n = len(vectors)
    p = rng.uniform(0.05, 0.95, (n, NUM_LAYERS, 1)).astype(np.float32)
    return TaskRows(
        [f"{i:032x}" for i in range(start, start + n)],
        vectors,
        rng.integers(0, 2, n).astype(np.int32),
        label_logprobs=np.log(np.concatenate([p, 1 - p], axis=2)),
    )
