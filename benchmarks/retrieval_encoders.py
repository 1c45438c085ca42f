"""Back ends of the encoder, the encoder cut to its first layers, and static embeddings made of it:
how fast, and how good."""

import random
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from benchmarks.prompt_rows import SOURCES
from raee_serve.checkpoints import resolve_encoder
from raee_serve.errors import TaskError
from raee_serve.exits.neighbours import log_votes
from raee_serve.retrieval.cut_encoder import cut_encoder
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.resources import BATCH_SIZE
from raee_serve.retrieval.search import InMemorySearch, Neighbours
from raee_serve.tasks.datasets import shuffled_examples
from raee_serve.tasks.registry import get_task

Encode = Callable[[Sequence[str]], NDArray[np.float32]]

TABLE_ROWS, TEST_ROWS = 2000, 500
VOTE_K, RECALL_K = 32, 12
STATIC_DIMENSION = 256
CUT_TO = (1, 2, 3, 4, 5)
"""Of the encoder's 6 layers."""


def compare_encoders(root: str) -> dict[str, dict[str, float]]:
    """By name of the encoder. Tables are built with torch; those for cut encoders and for static
    embeddings, which have vectors of their own, with the same."""
    try:
        tasks = {name: _examples(name, root) for name in SOURCES}
    except TaskError as e:
        print(f"encoders: left out, for want of data ({e})")
        return {}
    encoders: dict[str, Encode] = {n: Encoder("minilm", backend=n).encode for n in BATCH_SIZE}
    own = _cut([text for rows in tasks.values() for text in rows[0]])
    own["static"] = _static(Encoder("minilm"))
    encoders |= own
    result: dict[str, dict[str, float]] = {name: {} for name in encoders}
    for name, encode in encoders.items():
        result[name] |= _speed(encode, [text for test in tasks.values() for text in test[2]])
    for measure, by_name in _quality(encoders, tasks, own.keys()).items():
        for name, value in by_name.items():
            result[name][measure] = value
    print(f"{'encoder':10} one prompt, ms   32, prompts/s   recall@12   label vote")
    for name, m in result.items():
        print(
            f"{name:10} {m['p50_ms']:8.2f} {m['per_s']:17.0f} {m['recall']:14.3f} "
            f"{m['vote_accuracy']:11.3f}"
        )
    return result


Examples = tuple[list[str], NDArray[np.int32], list[str], NDArray[np.int32]]
"""Texts and labels of table rows, then of test rows."""


def _examples(name: str, root: str) -> Examples:
    parts: list[Any] = []
    for split, limit in (("train", TABLE_ROWS), ("test", TEST_ROWS)):
        rows = shuffled_examples(get_task(name), split, root, seed=0)
        parts += [
            [r.text for r in rows[:limit]],
            np.array([r.gold for r in rows[:limit]], np.int32),
        ]
    return tuple(parts)


def _speed(encode: Encode, texts: Sequence[str]) -> dict[str, float]:
    texts = random.Random(1).sample(list(texts), 320)
    encode(texts[:8])
    alone = []
    for text in texts[:160]:
        start = time.perf_counter()
        encode([text])
        alone.append(time.perf_counter() - start)
    together = []
    for i in range(0, len(texts), 32):
        start = time.perf_counter()
        encode(texts[i : i + 32])
        together.append(time.perf_counter() - start)
    return {
        "p50_ms": round(float(np.median(alone)) * 1e3, 2),
        "per_s": round(32 / float(np.median(together)), 1),
    }


def _quality(
    encoders: dict[str, Encode], tasks: dict[str, Examples], own: Collection[str]
) -> dict[str, dict[str, float]]:
    """own: names of encoders with vectors of their own."""
    recalls: dict[str, list[float]] = {name: [] for name in encoders}
    votes: dict[str, list[float]] = {name: [] for name in encoders}
    for table_texts, labels, test_texts, golds in tasks.values():
        table = encoders["torch"](table_texts)
        expected = _search(table, encoders["torch"](test_texts))
        for name, encode in encoders.items():
            rows = encode(table_texts) if name in own else table
            found = _search(rows, encode(test_texts))
            votes[name].append(_vote_accuracy(found, labels, golds))
            recalls[name].append(_recall(found, expected))
    return {
        "recall": {name: round(float(np.mean(v)), 4) for name, v in recalls.items()},
        "vote_accuracy": {name: round(float(np.mean(v)), 4) for name, v in votes.items()},
    }


def _search(rows: NDArray[np.float32], queries: NDArray[np.float32]) -> list[Neighbours]:
    return InMemorySearch({"": rows}).nearest([""], queries, VOTE_K)


def _recall(found: list[Neighbours], expected: list[Neighbours]) -> float:
    pairs = zip(found, expected, strict=True)
    common = [np.intersect1d(a.rows[:RECALL_K], b.rows[:RECALL_K]) for a, b in pairs]
    return float(np.mean([len(rows) / RECALL_K for rows in common]))


def _vote_accuracy(
    found: list[Neighbours], labels: NDArray[np.int32], golds: NDArray[np.int32]
) -> float:
    counts = np.bincount(labels)
    rows = np.stack([f.rows for f in found])
    similarities = 1 - np.stack([f.distances for f in found]).astype(np.float64)
    return float((log_votes(similarities, labels[rows], counts).argmax(axis=1) == golds).mean())


def _cut(texts: Sequence[str]) -> dict[str, Encode]:
    """Encoders of fewer layers in 8 bits, fitted on the texts of the tables."""
    encoders: dict[str, Encode] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for layers in CUT_TO:
            target = Path(scratch) / str(layers)
            print(cut_encoder("minilm", layers, texts, target))
            encoders[f"{layers} layers"] = Encoder(str(target), backend="onnx-int8").encode
    return encoders


def _static(encoder: Encoder) -> Encode:
    """One vector a token, what the encoder makes of the token alone, as model2vec distils: main
    components only, rare tokens (late in the vocabulary) weighted up."""
    tokenizer = SentenceTransformer(resolve_encoder("minilm"), device="cpu").tokenizer
    words = tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    vectors = encoder.encode([word.removeprefix("##") for word in words])
    centred = vectors - vectors.mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    weights = np.log(1 + np.arange(1, len(words) + 1))[:, None]
    table = (centred @ components[:STATIC_DIMENSION].T * weights).astype(np.float32)
    module = StaticEmbedding(tokenizer.backend_tokenizer, embedding_weights=table)
    model = SentenceTransformer(modules=[module], device="cpu")
    return lambda texts: model.encode(list(texts), normalize_embeddings=True)
