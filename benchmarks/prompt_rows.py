"""Exit tables of any size from real embeddings of real prompts; what their rows say is drawn."""

import hashlib
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import TaskError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.retrieval.encoder import Encoder
from raee_serve.table.build import complete
from raee_serve.table.schema import Built, TableMetadata, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import Split, load_examples
from raee_serve.tasks.registry import get_task

SOURCES = ("cr", "mpqa", "mr", "sst2", "sst5", "subj", "trec")
TASK = "sst2"
"""Whose rows the prompts of all sources are made."""
NUM_LAYERS = 18
BACKBONE = BackboneIdentity("Gemma3ForCausalLM", NUM_LAYERS, "00" * 32)
PROBED, HIDDEN = (6, 12, 18), 16
"""Layers that have a probe, and the size of the states that it is fitted to: a look-up needs the
time that it takes with any."""
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


def make_table(
    uri: str, encoder: Encoder, prompts: Sequence[str], num_rows: int, *, has_probes: bool
) -> ExitTable:
    """A table of one task: the prompts' own vectors, as many as there are, then jittered ones."""
    task = get_task(TASK)
    table = ExitTable.open_or_create(uri, TableMetadata(BACKBONE, encoder.identity()))
    table.put_task(TaskEntry.of(task, (10, 11), PROBED))
    own = encoder.encode(prompts[:num_rows])
    for start in range(0, num_rows, AT_ONCE):
        n = min(AT_ONCE, num_rows - start)
        real = own if start == 0 else own[:0]
        vectors = np.concatenate([real, jittered(own, n - len(real), seed=start)])
        table.add(TASK, _drawn(start, vectors, has_probes))
    if has_probes:
        complete(table, TASK)
    else:
        table.finish(TASK, Built(num_rows, "its rows are drawn"), None)
    return table


def _drawn(start: int, vectors: NDArray[np.float32], has_states: bool) -> TaskRows:
    rng = np.random.default_rng(start + 1)
    n = len(vectors)
    states = rng.standard_normal((n, len(PROBED), HIDDEN), np.float32).astype(np.float16)
    return TaskRows(
        [hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in range(start, start + n)],
        vectors,
        rng.integers(0, 2, n).astype(np.int32),
        plain_probs=rng.uniform(0.0, 1.0, (n, NUM_LAYERS)).astype(np.float32),
        full_logprobs=np.full((n, 2), np.log(0.5), np.float32),
        states=states if has_states else None,
    )
