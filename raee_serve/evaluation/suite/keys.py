"""What a prompt should be found by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from raee_serve.evaluation.baselines import Answers
from raee_serve.evaluation.probed import ProbedTask
from raee_serve.evaluation.suite.backbone import StudiedBackbone
from raee_serve.evaluation.suite.findings import Findings, Picture, Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.scores import averaged
from raee_serve.retrieval.aggregate import NO_EVIDENCE, RULES, exits
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.heads import label_counts, log_votes
from raee_serve.table.evidence import label_evidence
from raee_serve.table.schema import TaskRows
from raee_serve.table.task import Task, prompt_text, prompt_token_ids

QUESTION = (
    "Which vectors find the rows that tell an exit: of which encoder, of text or prompt, and by "
    "which distance?"
)
ROWS, PROMPTS = 1000, 200
"""A task's table rows and test rows that are embedded anew."""
SHARES = (0.0, 0.1, 0.25)
"""Of the backbone's layers, after which its states are tried; 0: the tokens' embeddings."""
BATCH = 16
RULE, VOTE_K = "earliest", 32

Vectors = NDArray[np.float32]
Similarity = Callable[[Vectors, Vectors], Vectors]
"""[n, d] queries, [m, d] rows -> [n, m], greater for what is nearer."""


def _cosine(queries: Vectors, rows: Vectors) -> Vectors:
    return _unit(queries) @ _unit(rows).T


def _inner(queries: Vectors, rows: Vectors) -> Vectors:
    return queries @ rows.T


def _euclidean(queries: Vectors, rows: Vectors) -> Vectors:
    return 2 * queries @ rows.T - (rows**2).sum(axis=1)


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


METRICS: dict[str, Similarity] = {
    "cosine": _cosine,
    "Euclidean": _euclidean,
    "inner product": _inner,
}


def run(material: Material) -> Findings:
    """Neighbours count alike, whatever their distance: distances of different kinds of vector are
    not comparable, and only which rows are found is asked."""
    backbone = StudiedBackbone(material.checkpoint)
    encoder = Encoder(material.table.metadata.encoder.name, threads=2)
    ways: dict[tuple[str, str], dict[str, tuple[Answers, float]]] = {}
    for task in tqdm(material.tasks, desc="keys", unit="task"):
        rows = material.some_rows(task, ROWS)
        asked = _first(material.asked(task), PROMPTS)
        for keys, own, queries in _vectors(material, task, rows, asked, backbone, encoder):
            for metric, similarity in METRICS.items():
                found = _answers(similarity(queries, own), rows, asked)
                ways.setdefault((keys, metric), {})[task.name] = found
    lines: list[Row] = []
    for (keys, metric), by_task in ways.items():
        exited = {task: own for task, (own, _) in by_task.items()}
        vote = float(np.mean([accuracy for _, accuracy in by_task.values()]))
        figures = averaged(material, exited)
        lines.append({"keys": keys, "metric": metric, **figures, "label vote": round(vote, 4)})
    notes = [
        f"{ROWS} rows and {PROMPTS} prompts a task, rule {RULE} with neighbours weighed alike; "
        f"label vote: of {VOTE_K} neighbours, classes balanced. Of unit vectors all three metrics "
        "find the same rows."
    ]
    picture = Picture("depth", "accuracy", "keys", ("low", "high"), joined=False)
    return Findings(lines, picture, notes)


def _first(asked: ProbedTask, n: int) -> ProbedTask:
    return ProbedTask(asked.texts[:n], asked.golds[:n], asked.vectors[:n], asked.label_logprobs[:n])


def _vectors(
    material: Material,
    task: Task,
    rows: TaskRows,
    asked: ProbedTask,
    backbone: StudiedBackbone,
    encoder: Encoder,
) -> Iterator[tuple[str, Vectors, Vectors]]:
    """Name of a kind of key, the rows' vectors, the prompts' vectors."""
    texts = material.texts(task, rows)
    name = material.table.metadata.encoder.name
    yield f"{name}, text", rows.vectors, asked.vectors
    rendered = [_of_prompts(encoder, backbone, task, own) for own in (texts, asked.texts)]
    yield f"{name}, whole prompt", rendered[0], rendered[1]
    layers = sorted({round(share * backbone.num_layers) for share in SHARES})
    own, queries = (_states(backbone, task, part, layers) for part in (texts, asked.texts))
    for position, layer in enumerate(layers):
        where = f"after layer {layer}" if layer else "of token embeddings"
        yield f"backbone, mean {where}", own[:, position], queries[:, position]


def _of_prompts(
    encoder: Encoder, backbone: StudiedBackbone, task: Task, texts: Sequence[str]
) -> Vectors:
    return encoder.encode([prompt_text(backbone.tokenizer, task.render(text)) for text in texts])


def _states(
    backbone: StudiedBackbone, task: Task, texts: Sequence[str], layers: Sequence[int]
) -> Vectors:
    """[n, len(layers), hidden], of the texts' prompts."""
    prompts = [prompt_token_ids(backbone.tokenizer, task.render(text)) for text in texts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with backbone.without(range(layers[-1] + 1, backbone.num_layers + 1)):  # nobody asks them
        parts = [
            backbone.mean_states([prompts[i] for i in order[first : first + BATCH]], layers)
            for first in range(0, len(order), BATCH)
        ]
    return np.concatenate(parts)[np.argsort(order)]


def _answers(similarities: Vectors, rows: TaskRows, asked: ProbedTask) -> tuple[Answers, float]:
    """What the rule answers with these neighbours, and the accuracy of their vote."""
    assert rows.golds is not None and rows.label_logprobs is not None
    num_layers, num_labels = asked.label_logprobs.shape[1:]
    nearest = np.argsort(-similarities, axis=1, kind="stable")
    evidence = label_evidence(rows.label_logprobs, rows.golds)[:, None]
    near = nearest[:, : RULES[RULE].k]
    layers, _ = exits(RULES[RULE], evidence[near], np.ones(near.shape))
    layers = np.where(layers == NO_EVIDENCE, num_layers, layers)
    scores = asked.label_logprobs[np.arange(len(layers)), layers - 1]
    voters = nearest[:, :VOTE_K]
    counts = label_counts(rows.golds, num_labels)
    votes = log_votes(np.ones(voters.shape), rows.golds[voters], counts)
    return (
        Answers(scores.argmax(axis=1), float(layers.mean() / num_layers)),
        float((votes.argmax(axis=1) == asked.golds).mean()),
    )
