"""What a table of one kind of prompt makes of prompts of another."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from raee_serve.errors import TaskError
from raee_serve.evaluation.offline import answers
from raee_serve.evaluation.probed import ProbedTask
from raee_serve.evaluation.suite.findings import Findings, Picture, Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.table.task import Task
from raee_serve.table.tasks import TASKS, get_task

QUESTION = "What becomes of prompts that the table was not built for, with and without the bound?"
SOURCE = "mr"
"""Whose rows the table holds, where it is among the tasks; else the first of them."""
OTHERS = ("sst2", "sst5", "cr", "mpqa", "subj", "trec", "ag_news")
RULE = "stacked"
EDIT_SHARE = 0.15
"""Of a text's words that an edit touches."""
NEVER_FAR = 2.0


def run(material: Material) -> Findings:
    source = next((t for t in material.tasks if t.name == SOURCE), material.tasks[0])
    asked = {f"{source.name}, its own test rows": material.asked(source)}
    for name, edit in EDITS.items():
        own = material.asked(source)
        rng = random.Random(material.source.seed)
        texts = [edit(text, rng) or text for text in own.texts]
        asked[f"{source.name}, {name}"] = material.probed(source, texts, own)
    missing = []
    for name in OTHERS:
        if name != source.name and name in TASKS:
            try:
                asked[name] = material.asked(get_task(name))
            except TaskError as e:
                missing.append(f"{name} is left out: {e}")
    rows: list[Row] = []
    table = {source.name: material.rows(source)}
    for bound, options in (("its own", {}), ("none", {"max_distance": NEVER_FAR})):
        retriever = material.retriever(table, list(asked.values()), **options)
        rows += [
            {"prompts": name, "distance bound": bound, **_outcome(retriever, source, name, prompts)}
            for name, prompts in asked.items()
        ]
    notes = [
        f"A table of {source.name} alone ({len(material.rows(source)):,} rows), rule {RULE}; "
        f"edits touch {EDIT_SHARE:.0%} of the words. Accuracy is shown where the prompts have the "
        "table's own label words; prompts that fall back are answered at full depth.",
        *missing,
    ]
    return Findings(rows, Picture("fall back", "accuracy", "prompts"), notes)


def _outcome(retriever: ExitRetriever, source: Task, name: str, prompts: ProbedTask) -> Row:
    """Prompts of another task are asked in the source's template."""
    other = TASKS.get(name, source)
    same = (other.label_words, other.prompt) == (source.label_words, source.prompt)
    own = answers(retriever, source, _comparable(prompts, retriever, source), RULE, None)
    fallback = own.reasons["far"] / own.reasons.total()
    return {
        "accuracy": round(float((own.predicted == prompts.golds).mean()), 4) if same else "",
        "full depth": round(
            float((prompts.label_logprobs[:, -1].argmax(axis=1) == prompts.golds).mean()), 4
        )
        if same
        else "",
        "depth": round(own.depth, 4),
        "fall back": round(fallback, 4),
    }


def _comparable(prompts: ProbedTask, retriever: ExitRetriever, source: Task) -> ProbedTask:
    """The same prompts, with scores of as many label words as the source has."""
    words = len(source.label_words)
    scores = prompts.label_logprobs
    if scores.shape[2] != words:
        scores = np.zeros((*scores.shape[:2], words), np.float32)
    return ProbedTask(prompts.texts, prompts.golds, prompts.vectors, scores)


def _typos(text: str, rng: random.Random) -> str:
    """Two neighbouring letters change places."""
    words = text.split()
    for i, word in enumerate(words):
        if len(word) > 3 and rng.random() < EDIT_SHARE:
            at = rng.randrange(len(word) - 1)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def _dropped(text: str, rng: random.Random) -> str:
    return " ".join(word for word in text.split() if rng.random() >= EDIT_SHARE)


def _moved(text: str, rng: random.Random) -> str:
    """A word changes places with the next one: another order, the same words."""
    words = text.split()
    for i in range(len(words) - 1):
        if rng.random() < EDIT_SHARE:
            words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


EDITS: dict[str, Callable[[str, random.Random], str]] = {
    "typing errors": _typos,
    "words left out": _dropped,
    "words moved": _moved,
}
