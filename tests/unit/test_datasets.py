"""Examples of tasks: checked, held out, in a fixed order, from files and hub data sets."""

import hashlib
import json
from dataclasses import replace

import pytest

from raee_serve.errors import TaskError
from raee_serve.tasks.data_source import DataSource
from raee_serve.tasks.datasets import (
    Example,
    is_held_out,
    load,
    load_examples,
    shortened,
    shuffled_examples,
)
from raee_serve.tasks.prompts import CompletionPrompt
from raee_serve.tasks.registry import TASKS, get_task
from raee_serve.tasks.task import Task

pytestmark = pytest.mark.unit

ANSWERS = (("0", "bad"), ("1", "good"))
SOURCE = DataSource("words/train.jsonl", "words/test.jsonl", "text", "label", ANSWERS)
WORDS = Task("words", CompletionPrompt("{text} It was"), ("bad", "good"), SOURCE)
NOTES = Task(
    "free",
    CompletionPrompt("{text}\nTL;DR:"),
    data=DataSource("f/train.jsonl", None, "document", "summary"),
)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))


def held_out(folder, rows, share=0.5, labels=("bad", "good")):
    """A task of its own file, with a share of its rows held out."""
    write_jsonl(folder / "a.jsonl", [{"text": text, "label": label} for text, label in rows])
    answers = tuple((label, label) for label in labels)
    source = DataSource("a.jsonl", share, "text", "label", answers, folder)
    return Task("own", WORDS.prompt, labels, source)


def texts(task, split):
    return [example.text for example in load_examples(task, split)]


def test_rows_become_examples(tmp_path):
    rows = [{"text": " fine\u2028film ", "label": 1}, {"text": "  ", "label": 0}, ""]
    rows += [{"text": None, "label": None}, {"text": "poor", "label": "0"}]
    write_jsonl(tmp_path / "words" / "train.jsonl", rows[:4])
    loaded = load(WORDS, "train", tmp_path)
    assert loaded.examples == [Example("fine\u2028film", 1)] and loaded.blank == 2


@pytest.mark.parametrize("values", [[" 1 ", "0"], [1, 0]])
def test_label_values_count_by_their_text(tmp_path, values):
    write_jsonl(
        tmp_path / "words" / "train.jsonl",
        [{"text": value_text, "label": v} for value_text, v in zip("ab", values, strict=True)],
    )
    assert load_examples(WORDS, "train", tmp_path) == [Example("a", 1), Example("b", 0)]


def test_true_and_false_are_labels(tmp_path):
    task = held_out(tmp_path, [("x", True), ("y", False)], labels=("true", "false"))
    task = replace(task, data=replace(task.data, test=None))
    assert [e.gold for e in load_examples(task, "train")] == [0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"train.jsonl:2: column 'label' is missing; there are: 'text'"),
        ({"text": 3, "label": 0}, r":2: column 'text' holds a number, 3; allowed: text"),
        ({"text": ["x"], "label": 0}, r":2: column 'text' holds a list, \['x'\]; allowed: text"),
        ({"text": "\ud800", "label": 0}, r":2: column 'text' holds '\\ud800', half of a surrogate"),
        ({"text": "x", "label": 2}, r":2: column 'label' holds '2', .* words; allowed: '0', '1'"),
        ({"text": "x", "label": 1.5}, r":2: column 'label' holds '1.5', which is no label"),
        ({"text": "x", "label": True}, r":2: .* holds true or false, and a number at .*:1;"),
        ({"text": "x", "label": "1"}, r":2: .* holds text, and a number at .*:1; allowed: one"),
        ({"text": "x", "label": None}, r":2: column 'label' is blank; allowed: a label"),
        ({"text": "x", "label": " "}, r":2: column 'label' is blank"),
        ('{"text": "x", "label": NaN}', r":2: column 'label' holds a number, nan; allowed"),
        ('{"text": "x", "label": 1e999}', r":2: column 'label' holds a number, inf; allowed"),
        ({"text": "x", "label": [1]}, r":2: column 'label' holds a list, \[1\]; allowed: text, a"),
        ({"text": "x", "label": {"a": 1}}, r":2: column 'label' holds an object"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    write_jsonl(tmp_path / "words" / "train.jsonl", [{"text": "x", "label": 1}, row])
    with pytest.raises(TaskError, match=message) as error:
        load_examples(WORDS, "train", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gold", "message"), [(" ", "'summary' is blank"), (3, "'summary' holds a number; allowed: te")]
)
def test_bad_references_are_refused(tmp_path, gold, message):
    write_jsonl(tmp_path / "f" / "train.jsonl", [{"document": "x", "summary": gold}])
    with pytest.raises(TaskError, match=message):
        load_examples(NOTES, "train", tmp_path)


def test_references_are_kept_as_they_are(tmp_path):
    write_jsonl(tmp_path / "f" / "train.jsonl", [{"document": " x ", "summary": " y\n"}])
    assert load_examples(NOTES, "train", tmp_path) == [Example("x", " y\n")]


def test_a_file_without_rows_is_refused(tmp_path):
    write_jsonl(tmp_path / "words" / "train.jsonl", [{"text": " ", "label": 1}])
    with pytest.raises(TaskError, match=r"no train rows with a text in words/train\.jsonl"):
        load_examples(WORDS, "train", tmp_path)


def test_missing_file_and_missing_root(tmp_path):
    with pytest.raises(TaskError, match=r"cannot read .*words/test\.jsonl: No such file"):
        load_examples(WORDS, "test", tmp_path)
    with pytest.raises(TaskError, match=r"without its data; give --data .*ROOT/words/train.jsonl$"):
        load_examples(WORDS, "test")
    with pytest.raises(TaskError, match=r"without its data; give --data ROOT \(or set RAEE_DATA"):
        load_examples(WORDS, "test", "hub")
    with pytest.raises(TaskError, match=r"or --data hub for SetFit/CR"):
        load_examples(get_task("cr"), "train")
    with pytest.raises(TaskError, match="empty path"):
        load_examples(WORDS, "train", "")
    with pytest.raises(TaskError, match="names no test rows"):
        load_examples(NOTES, "test", tmp_path)
    with pytest.raises(TaskError, match=r"its table does not say; give its task file"):
        load_examples(replace(WORDS, data=None), "train", tmp_path)


def test_home_is_a_root(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "d" / "words" / "train.jsonl", [{"text": "x", "label": 1}])
    assert load_examples(WORDS, "train", "~/d") == [Example("x", 1)]


def test_a_share_is_held_out_by_text(tmp_path):
    rows = [(f"text {n}", "good" if n % 3 else "bad") for n in range(400)]
    task = held_out(tmp_path, rows, 0.2)
    train, test = texts(task, "train"), texts(task, "test")
    assert sorted(train + test) == sorted(text for text, _ in rows)
    assert 50 < len(test) < 110
    assert train == [text for text, _ in rows if not is_held_out(text, 0.2)]
    more = [(f"more {n}", "fair") for n in range(50)]
    grown = held_out(tmp_path, [*more, *rows], 0.2, ("bad", "fair", "good"))
    assert set(test) <= set(texts(grown, "test")) and set(train) <= set(texts(grown, "train"))


def test_duplicates_count_once_and_a_test_text_is_in_no_training_row(tmp_path):
    rows = [(f"text {n}", label) for n in range(40) for label in ("bad", "bad", "good")]
    task = held_out(tmp_path, rows)
    train, test = load(task, "train"), load(task, "test")
    assert not {e.text for e in train.examples} & {e.text for e in test.examples}
    assert len(train.examples) + len(test.examples) == 80
    assert train.duplicates + test.duplicates == 40
    assert len(set(train.examples)) == len(train.examples)


def test_too_few_rows_to_hold_one_out(tmp_path):
    with pytest.raises(TaskError, match=r"no test rows with a text in a\.jsonl"):
        load(held_out(tmp_path, [("x", "good")], 1e-9), "test")


def test_a_file_of_its_own_needs_no_root(tmp_path):
    task = held_out(tmp_path, [("x", "good")], 1e-9)
    for root in (None, "hub", "/nowhere"):
        assert load_examples(task, "train", root) == [Example("x", 1)]


@pytest.fixture
def hub_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"sentence": "fine", "name": "pos"}])
    answers = (("neg", "bad"), ("pos", "good"))
    hub = str(tmp_path / "set")
    return DataSource("train", "test", "sentence", "name", answers, hub=hub)


def test_hub_labels_are_mapped_to_the_tasks(hub_set):
    for task in (replace(WORDS, hub=hub_set), replace(WORDS, data=hub_set)):
        assert load_examples(task, "train", "hub") == [Example("fine", 1)]
        with pytest.raises(TaskError, match=r"cannot load hub data set .*set \(test\)") as error:
            load_examples(task, "test", "hub")
        assert "\n" not in str(error.value)
    with pytest.raises(TaskError, match=r"set\[train\]: column 'text' is missing; .*'sentence'"):
        load_examples(replace(WORDS, data=replace(hub_set, text="text")), "train")


@pytest.mark.parametrize("answers", [(("0", "bad"), ("1", "good")), (("n", "bad"), ("p", "good"))])
def test_a_hubs_named_labels_go_by_number_or_name(hub_set, answers, monkeypatch):
    import datasets

    label = datasets.ClassLabel(names=["n", "p"])
    features = datasets.Features({"sentence": datasets.Value("string"), "name": label})
    rows = datasets.Dataset.from_dict({"sentence": ["x", "y"], "name": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    task = replace(WORDS, data=replace(hub_set, answers=answers))
    assert load_examples(task, "train") == [Example("x", 1), Example("y", 0)]


SHUFFLED = {
    "ag_news": ("a90ee04e61e4", "7c57030de5fb"),
    "cnndm": ("8e725f0c56a5", "6d64f480f7ef"),
    "cola": ("519f21168e89", "41ff7a512134"),
    "cr": ("a7e824d71966", "3328474072c3"),
    "demo_chat_sentiment": ("3c2ecb792fc0", "73f1d222f924"),
    "demo_sentiment": ("3c2ecb792fc0", "73f1d222f924"),
    "demo_summary": ("18d8f71f4f15", "4ed4684572cd"),
    "mpqa": ("04e6822f52d6", "2644e54985d9"),
    "mr": ("12623c92a462", "57f30ddb0ca3"),
    "sst2": ("c69d3ac5e578", "af9d87852a06"),
    "sst5": ("0a15e92d5e81", "40b097ce23fd"),
    "subj": ("6b7196bb0cf3", "c34b149ec785"),
    "trec": ("e975bbd0a2ef", "04e1539e5f15"),
    "xsum": ("4a32feba637e", "e4ddd68e524e"),
}
"""Of the rows of a seeded shuffle, as all earlier figures were made with."""


def digest(task, split, root):
    rows = [[e.text, e.gold] for e in shuffled_examples(task, split, root, seed=3)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


@pytest.mark.parametrize("name", SHUFFLED)
def test_seeded_shuffles_of_shipped_tasks_stay_as_they_were(name, data_root):
    found = tuple(digest(get_task(name), split, data_root) for split in ("train", "test"))
    assert found == SHUFFLED[name]


def test_demo_sets_ship_with_the_package():
    demo = [task for task in TASKS.values() if task.data and task.data.folder]
    assert [task.name for task in demo] == [
        "demo_chat_sentiment",
        "demo_sentiment",
        "demo_summary",
    ]
    for task in demo:
        for split in ("train", "test"):
            assert len(load_examples(task, split)) >= 8


def test_texts_are_cut_to_their_first_words_and_short_ones_left_alone():
    whole = [Example("rain  fell all\nday", "wet"), Example("no  rain", "dry")]
    assert shortened(whole, None) == whole
    assert shortened(whole, 3) == [Example("rain fell all", "wet"), whole[1]]
    with pytest.raises(TaskError, match="--words 0 is not allowed"):
        shortened(whole, 0)
