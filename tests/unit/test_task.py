"""Tasks: rendering and matching are inverse, labels and versions, and where tasks are found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from raee_serve.errors import TaskError
from raee_serve.tasks.prompts import (
    ChatPrompt,
    CompletionPrompt,
    chat_prompt,
    described_prompt,
    prompt_of,
)
from raee_serve.tasks.registry import TASKS, get_task, get_tasks
from raee_serve.tasks.task import Task, answer_token_ids, prompt_token_ids

pytestmark = pytest.mark.unit

WORDS = Task("words", CompletionPrompt("{text} It was"), ("bad", "good"))
CHAT = Task("chat", ChatPrompt("Good or bad? {text}!"), ("bad", "good"))
TURNS = (("system", "Be brief."), ("user", "Fine?"), ("assistant", "good"), ("user", "{text}?"))
CONVERSATION = Task("turns", chat_prompt(TURNS), ("bad", "good"))


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


def test_a_conversation_matches_as_a_whole():
    sent = CONVERSATION.render("a film")
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    assert CONVERSATION.match(sent) == "a film"
    parts = [{"type": "text", "text": "a film?"}]
    assert CONVERSATION.match([*sent[:3], {"role": "user", "content": parts}]) == "a film"
    others = [
        sent[1:],
        sent[:3],
        [*sent, sent[3]],
        [{"role": "system", "content": "Be long."}, *sent[1:]],
        [*sent[:2], {"role": "assistant", "content": "bad"}, sent[3]],
        [*sent[:2], {"role": "user", "content": "good"}, sent[3]],
        [*sent[:2], {"role": "assistant", "content": None}, sent[3]],
        [*sent[:3], {"role": "user", "content": "?"}],
    ]
    assert [CONVERSATION.match(other) for other in others] == [None] * len(others)


def test_the_slot_may_be_in_an_earlier_message():
    prompt = chat_prompt([("user", "Read {text}."), ("assistant", "ok"), ("user", "Good?")])
    assert prompt.match(prompt.render("it")) == "it"
    assert prompt.match([{"role": "system", "content": "x"}, *prompt.render("it")]) == "it"


@pytest.mark.parametrize("prompt", [WORDS.prompt, CHAT.prompt, CONVERSATION.prompt])
def test_described_prompts_come_back(prompt):
    assert prompt_of(*described_prompt(prompt)) == prompt


@pytest.mark.parametrize(
    ("kind", "template"),
    [("spoken", "{text}"), ("messages", "{text}"), ("messages", '[["user"]]'), ("messages", "[]")],
)
def test_other_descriptions_are_refused(kind, template):
    with pytest.raises(TaskError, match="prompt"):
        prompt_of(kind, template)


@pytest.mark.parametrize("template", ["no slot", "{text} and {text}"])
def test_template_needs_exactly_one_slot(template):
    with pytest.raises(TaskError, match="exactly once"):
        CompletionPrompt(template)
    with pytest.raises(TaskError, match="exactly once"):
        ChatPrompt(template)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "last message .* role user"),
        ([("user", "{text}"), ("assistant", "x")], "last message .* role user"),
        ([("user", "{text}"), ("system", "x"), ("user", "x")], "'system' of message 2"),
        ([("tool", "x"), ("user", "{text}")], "'tool' of message 1 .* allowed: system for the"),
        ([("system", "{text}"), ("user", "{text}")], "exactly once"),
    ],
)
def test_other_messages_make_no_prompt(messages, message):
    with pytest.raises(TaskError, match=message):
        chat_prompt(messages)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("good",), "two or more different"),
        (("good", "good"), "two or more different"),
        (("good", ""), "label '' is not allowed"),
        (("good", " bad"), "label ' bad' is not allowed: blank, or with space around it"),
    ],
)
def test_labels_must_be_several_and_different(labels, message):
    with pytest.raises(TaskError, match=message):
        Task("t", CompletionPrompt("{text}"), labels)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-a", "é", "x" * 65, "a\n"])
def test_names_that_are_not_allowed(name):
    with pytest.raises(TaskError, match="64 at most"):
        Task(name, CompletionPrompt("{text}"))


def test_version_follows_template_and_labels_only():
    same = Task("renamed", CompletionPrompt("{text} It was"), ("bad", "good"))
    assert same.version == WORDS.version
    others = [
        Task("t", CompletionPrompt("{text} It is"), ("bad", "good")),
        Task("t", CompletionPrompt("{text} It was"), ("good", "bad")),
        Task("t", ChatPrompt("{text} It was"), ("bad", "good")),
        Task("t", ChatPrompt("{text} It was", (("system", "Be brief."),)), ("bad", "good")),
    ]
    assert len({task.version for task in [WORDS, *others]}) == 5


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("sst2", "3d38f02493b4"),
        ("trec", "7c8069ab4f80"),
        ("cnndm_shots", "c7622183b09d"),
        ("xsum_shots", "8d2ad099eb3f"),
        ("xsum_chat", "deb276c1bc6c"),
        ("demo_chat_sentiment", "c42502dd3c80"),
    ],
)
def test_versions_of_shipped_tasks_bind_the_tables_there_are(name, version):
    assert get_task(name).version == version


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


def test_plain_token_ids_are_first_tokens_that_differ():
    assert CHAT.plain_token_ids(CharTokenizer()) == (ord("b"), ord("g"))
    assert WORDS.plain_token_ids(CharTokenizer()) == ()  # both begin with the space


@pytest.mark.parametrize("backbone", ["smollm2", "gemma3"])
def test_shipped_labels_differ_in_their_first_token(backbone, request):
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(backbone))
    for task in TASKS.values():
        if isinstance(task.prompt, ChatPrompt) and not tokenizer.chat_template:
            continue
        ids = task.plain_token_ids(tokenizer)
        for text, token in zip(task.label_texts(), ids, strict=True):
            assert text.startswith(tokenizer.decode([token]))


def test_answer_must_not_change_the_prompts_tokens():
    class WholeTextTokenizer(CharTokenizer):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [hash(text)]}

    with pytest.raises(TaskError, match="merges into the end"):
        answer_token_ids(WholeTextTokenizer(), "It was", " good")


def test_tasks_are_found_by_name_or_file(tmp_path, monkeypatch):
    (tmp_path / "own.toml").write_text('name = "own"\nprompt = "{text}"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("own.toml", "./own.toml", "~/own.toml", str(tmp_path / "own.toml")):
        assert get_task(name).name == "own"
    assert [task.name for task in get_tasks(["cr", "own.toml", "cr"])] == ["cr", "own"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"unknown task ''; allowed: a task file \(\.toml\), or one of ag_news"),
        ("missing.toml", r"cannot read missing\.toml: No such file"),
        ("./cr", r"cannot read cr: No such file"),
        (".", "unknown task"),
        ("./", r"is a directory; a file is needed"),
    ],
)
def test_tasks_that_are_not_there(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=message):
        get_task(name)


def test_two_tasks_of_one_name_are_refused(tmp_path):
    (tmp_path / "own.toml").write_text('name = "cr"\nprompt = "{text}"')
    with pytest.raises(TaskError, match=r"task cr is given twice, the second time as .*own.toml"):
        get_tasks(["cr", str(tmp_path / "own.toml")])
