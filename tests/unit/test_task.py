"""Tasks: rendering and matching are inverse, labels have distinct first tokens, data is checked."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from raee_serve.errors import TaskError
from raee_serve.table.datasets import (
    DemoSet,
    Example,
    HubSet,
    LocalSet,
    load_examples,
    shortened,
)
from raee_serve.table.prompts import ChatPrompt, CompletionPrompt
from raee_serve.table.task import Task, answer_token_ids, prompt_token_ids
from raee_serve.table.tasks import TASKS, get_task

pytestmark = pytest.mark.unit

WORDS = Task("words", CompletionPrompt("{text} It was"), ("bad", "good"), LocalSet("words"))
CHAT = Task("chat", ChatPrompt("Good or bad? {text}!"), ("bad", "good"))
FREE = Task("free", CompletionPrompt("{text}\nTL;DR:"), local=LocalSet("f", "document", "summary"))


@pytest.mark.parametrize("name", sorted(TASKS))
@given(text=st.text(min_size=1).filter(str.strip))
def test_every_task_recognises_its_own_prompts(name, text):
    task = TASKS[name]
    assert task.match(task.render(text)) == text.strip()


def test_registry_holds_the_published_tasks():
    sentences = {"sst2", "sst5", "mr", "cr", "mpqa", "subj", "trec", "cola"}
    assert sentences | {"ag_news", "cnndm", "xsum"} <= TASKS.keys()
    assert {name for name, task in TASKS.items() if task.kind == "free-text"} == {
        *("cnndm", "cnndm_chat", "cnndm_shots"),
        *("xsum", "xsum_chat", "xsum_shots"),
        "demo_summary",
    }


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(TaskError, match=r"'sst3'.*cola.*sst2"):
        get_task("sst3")


@pytest.mark.parametrize(
    "prompt",
    [
        "It was",
        " It was",
        "   It was",
        "a film. It was ",
        "a film. It is",
        "",
        [{"role": "user", "content": "a film. It was"}],
        [1, 2, 3],
    ],
)
def test_other_prompts_do_not_match_a_completion_task(prompt):
    assert WORDS.match(prompt) is None


def test_chat_matches_one_user_message_after_system_messages():
    user = CHAT.render("a film")[0]
    assert CHAT.match([user]) == "a film"
    assert CHAT.match([{"role": "system", "content": "Be brief."}, user]) == "a film"
    parts = [{"type": "text", "text": user["content"]}]
    assert CHAT.match([{"role": "user", "content": parts}]) == "a film"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Good or bad? a film!",
        [{"role": "assistant", "content": "Good or bad? a film!"}],
        [{"role": "user", "content": "Hello"}, {"role": "user", "content": "Good or bad? a film!"}],
        [{"role": "user", "content": "Good or bad? !"}],
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["Good or bad? a film!"]}],
    ],
)
def test_other_conversations_do_not_match_a_chat_task(messages):
    assert CHAT.match(messages) is None


@pytest.mark.parametrize("template", ["no slot", "{text} and {text}"])
def test_template_needs_exactly_one_slot(template):
    with pytest.raises(TaskError, match="exactly once"):
        CompletionPrompt(template)


@pytest.mark.parametrize("words", [("good",), ("good", "good")])
def test_label_words_must_be_several_and_different(words):
    with pytest.raises(TaskError, match="two or more different"):
        Task("t", CompletionPrompt("{text}"), words)


def test_version_follows_template_and_labels_only():
    same = Task("renamed", CompletionPrompt("{text} It was"), ("bad", "good"))
    assert same.version == WORDS.version
    others = [
        Task("t", CompletionPrompt("{text} It is"), ("bad", "good")),
        Task("t", CompletionPrompt("{text} It was"), ("good", "bad")),
        Task("t", ChatPrompt("{text} It was"), ("bad", "good")),
    ]
    assert len({task.version for task in [WORDS, *others]}) == 4


def test_label_texts_continue_the_prompt():
    assert WORDS.label_texts() == (" bad", " good")
    assert CHAT.label_texts() == ("bad", "good")


class CharTokenizer:
    """One token per character, <bos>=0 when special tokens are asked for; chats as <role>text."""

    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_prompts_are_tokenised_as_the_server_does():
    tokenizer = CharTokenizer()
    assert prompt_token_ids(tokenizer, "ab") == [0, 97, 98]
    chat = prompt_token_ids(tokenizer, CHAT.render("x"))
    assert "".join(map(chr, chat)) == "<user>Good or bad? x!<assistant>"


def test_chat_prompt_needs_a_chat_template():
    tokenizer = CharTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TaskError, match="no chat template"):
        prompt_token_ids(tokenizer, CHAT.render("x"))


def test_labels_must_differ_in_their_first_token():
    assert CHAT.label_token_ids(CharTokenizer()) == (ord("b"), ord("g"))
    with pytest.raises(TaskError, match="do not differ in their first"):
        WORDS.label_token_ids(CharTokenizer())  # both begin with the space


@pytest.mark.parametrize("backbone", ["smollm2", "gemma3"])
def test_every_tasks_labels_differ_under_real_tokenizers(backbone, request):
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(backbone))
    for task in TASKS.values():
        if isinstance(task.prompt, ChatPrompt) and not tokenizer.chat_template:
            continue
        ids = task.label_token_ids(tokenizer)
        for text, token in zip(task.label_texts(), ids, strict=True):
            assert text.startswith(tokenizer.decode([token]))


def test_answer_must_not_change_the_prompts_tokens():
    class WholeTextTokenizer(CharTokenizer):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [hash(text)]}

    with pytest.raises(TaskError, match="merges into the end"):
        answer_token_ids(WholeTextTokenizer(), "It was", " good")


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))


def test_local_examples(tmp_path):
    rows = [{"text": " fine\u2028film ", "label": 1}, {"text": "  ", "label": 0}, ""]
    write_jsonl(tmp_path / "words" / "train.jsonl", rows)
    assert load_examples(WORDS, "train", tmp_path) == [Example("fine\u2028film", 1)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"train.jsonl:1: not JSON"),
        ("[]", r"train.jsonl:1: expected an object, got list"),
        ({"text": "x"}, r"no field \['label'\]; it has \['text'\]"),
        ({"text": 3, "label": 0}, r"field text is not a string: 3"),
        ({"text": "x", "label": 2}, r"label 2 of task words is not an index within 0..1"),
        ({"text": "x", "label": -1}, r"label -1"),
        ({"text": "x", "label": True}, r"label True"),
        ({"text": "x", "label": "good"}, r"label 'good'"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    write_jsonl(tmp_path / "words" / "train.jsonl", [row])
    with pytest.raises(TaskError, match=message):
        load_examples(WORDS, "train", tmp_path)


def test_empty_reference_is_refused(tmp_path):
    write_jsonl(tmp_path / "f" / "train.jsonl", [{"document": "x", "summary": " "}])
    with pytest.raises(TaskError, match="non-empty"):
        load_examples(FREE, "train", tmp_path)


def test_missing_file_and_missing_root(tmp_path):
    with pytest.raises(TaskError, match=r"words/test\.jsonl"):
        load_examples(WORDS, "test", tmp_path)
    with pytest.raises(TaskError, match="needs a data directory"):
        load_examples(WORDS, "test")
    with pytest.raises(TaskError, match="no hub data set"):
        load_examples(WORDS, "test", "hub")


def test_hub_labels_are_mapped_to_the_order_of_the_label_words(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"sentence": "fine", "name": "pos"}])
    source = HubSet(str(tmp_path / "set"), None, "sentence", "name", labels=("neg", "pos"))
    task = Task("t", WORDS.prompt, WORDS.label_words, hub=source)
    assert load_examples(task, "train", "hub") == [Example("fine", 1)]
    with pytest.raises(TaskError, match=r"cannot load hub data set .*set \(test\)"):
        load_examples(task, "test", "hub")


def test_demo_sets_ship_with_the_package():
    tasks = [t for t in TASKS.values() if isinstance(t.demo, DemoSet)]
    assert len(tasks) == 3
    for task in tasks:
        for split in ("train", "test"):
            assert len(load_examples(task, split)) >= 8


def test_texts_are_cut_to_their_first_words_and_short_ones_left_alone():
    whole = [Example("rain  fell all\nday", "wet"), Example("no  rain", "dry")]
    assert shortened(whole, None) == whole
    assert shortened(whole, 3) == [Example("rain fell all", "wet"), whole[1]]
    with pytest.raises(TaskError, match="--words 0 is not allowed"):
        shortened(whole, 0)
