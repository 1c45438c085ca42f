"""The shipped demo sets are sound: balanced, without a test row among the training rows."""

import json
from importlib import resources

import pytest

from raee_serve.tasks.datasets import load_examples
from raee_serve.tasks.registry import get_task

pytestmark = pytest.mark.unit


def examples(task, split):
    return load_examples(get_task(task), split)


@pytest.mark.parametrize("task", ["demo_sentiment", "demo_summary"])
def test_no_text_is_used_twice(task):
    texts = [
        example.text.lower() for split in ("train", "test") for example in examples(task, split)
    ]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize(("split", "rows"), [("train", 164), ("test", 60)])
def test_sentiments_are_balanced(split, rows):
    golds = [example.gold for example in examples("demo_sentiment", split)]
    assert len(golds) == rows
    assert sum(golds) * 2 == rows
    labels = resources.files("raee_serve") / "demo_data" / "sentiment_labels.json"
    assert json.loads(labels.read_text()) == ["negative", "positive"]


@pytest.mark.parametrize(("split", "rows"), [("train", 24), ("test", 8)])
def test_summaries_are_one_sentence_of_a_short_note(split, rows):
    notes = examples("demo_summary", split)
    assert len(notes) == rows
    for note in notes:
        assert 60 <= len(note.text.split()) <= 120
        assert note.gold.endswith(".")
        assert len(note.gold.split()) < 30
