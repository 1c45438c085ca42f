"""Task files: every part of one, and every mistake in one as one line that names it."""

import json
from pathlib import Path

import pytest

from raee_serve.errors import TaskError
from raee_serve.tasks.data_source import DataSource
from raee_serve.tasks.datasets import Example, load_examples
from raee_serve.tasks.prompts import ChatPrompt, CompletionPrompt
from raee_serve.tasks.task_file import read_task_file

pytestmark = pytest.mark.unit

NAME = 'name = "tickets"\n'
PROMPT = NAME + 'prompt = "{text}\\nIntent:"\n'
DATA = '[data]\ntrain = "tickets.csv"\ntest = 0.1\ntext = "body"\nlabel = "category"\n'
AUTO = PROMPT + 'labels = "auto"\n' + DATA
LISTED = PROMPT + 'labels = ["a", "b"]\n'
NOTES = DATA.replace("label", "reference")
HUB = '[hub]\nhub = "o/s"\ntext = "t"\nlabel = "l"\n'
ROWS = "body,category\nmy card,refund please\nhello, greeting \nbye,cancel\nmy card,cancel\n"


@pytest.fixture
def own(tmp_path):
    """Writes the task file beside its data, and reads it."""

    def read(toml, rows=ROWS):
        (tmp_path / "tickets.csv").write_text(rows)
        data = toml if isinstance(toml, bytes) else toml.encode()
        (tmp_path / "tickets.toml").write_bytes(data)
        return read_task_file(tmp_path / "tickets.toml")

    return read


def test_labels_out_of_the_data(own, tmp_path):
    task = own(AUTO)
    assert task.name == "tickets" and task.prompt == CompletionPrompt("{text}\nIntent:")
    assert task.labels == ("cancel", "greeting", "refund please")
    assert task.label_texts()[2] == " refund please"
    answers = tuple((label, label) for label in task.labels)
    assert task.data == DataSource("tickets.csv", 0.1, "body", "category", answers, tmp_path)
    assert load_examples(task, "train")[0] == Example("hello", 1)  # "my card" is held out
    assert load_examples(task, "test") == [Example("my card", 2), Example("my card", 0)]


def test_listed_labels_keep_their_order(own):
    task = own(PROMPT + 'labels = ["refund please", "greeting", "cancel"]\n' + DATA)
    assert task.labels == ("refund please", "greeting", "cancel")
    assert [e.gold for e in load_examples(task, "train")] == [1, 2]


@pytest.mark.parametrize(
    "labels",
    [
        'labels = {"refund please" = "money", greeting = "hi there", cancel = "money"}\n' + DATA,
        DATA + '[labels]\n"refund please" = "money"\ngreeting = "hi there"\ncancel = "money"\n',
    ],
)
def test_a_table_says_what_is_answered_for_a_value(own, labels):
    task = own(PROMPT + labels)
    assert task.labels == ("money", "hi there")
    assert [e.gold for e in load_examples(task, "train")] == [1, 0]


def test_free_text(own):
    task = own(PROMPT + NOTES.replace("test = 0.1", 'test = "other.csv"'))
    assert task.kind == "free-text" and task.data.test == "other.csv"
    assert load_examples(task, "train")[1] == Example("hello", " greeting ")


def test_messages(own):
    turns = '[[messages]]\nrole = "system"\ncontent = "Be brief."\n'
    turns += '[[messages]]\nrole = "user"\ncontent = "{text}?"\n'
    assert own(NAME + turns).prompt == ChatPrompt("{text}?", (("system", "Be brief."),))
    assert own(NAME + turns + DATA.replace("label", "reference")).kind == "free-text"


def test_paths_are_relative_to_the_file_or_home(own, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("tickets.csv", "./tickets.csv", "~/tickets.csv", str(tmp_path / "tickets.csv")):
        assert len(own(AUTO.replace("tickets.csv", path)).labels) == 3
    monkeypatch.chdir(tmp_path)
    assert read_task_file(Path("tickets.toml")).data.folder == tmp_path


def test_a_hub_data_set(own):
    task = own(LISTED + '[data]\nhub = "o/s"\nconfig = "c"\ntext = "t"\nlabel = "l"\n')
    answers = (("a", "a"), ("b", "b"))
    assert task.data.hub == "o/s" and task.data.config == "c"
    assert (task.data.train, task.data.test, task.data.answers) == ("train", "test", answers)
    named = 'train = "t"\ntest = 0.5\n'
    task = own(LISTED + f'[data]\nhub = "o/s"\n{named}text = "t"\nlabel = "l"\n')
    assert (task.data.train, task.data.test) == ("t", 0.5)


def test_a_hub_section_for_shipped_tasks(own, tmp_path):
    own(LISTED + DATA + HUB + '[hub.labels]\n1 = "b"\n0 = "a"\n')
    task = read_task_file(tmp_path / "tickets.toml", is_shipped=True)
    assert task.data.folder is None and task.hub.answers == (("1", "b"), ("0", "a"))
    assert own(LISTED + DATA + HUB).hub.answers == (("a", "a"), ("b", "b"))
    assert own(PROMPT + NOTES + HUB.replace("label", "reference")).hub.gold == "l"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings(own, encoding):
    assert len(own(AUTO.replace("\n", "\r\n").encode(encoding)).labels) == 3


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("", "key name is missing"),
        ("name = x", r"not TOML: Invalid value \(at line 1, column 8\)"),
        (NAME + NAME, "not TOML: Cannot overwrite a value"),
        (b'name = "caf\xe9"', ":1: byte 0xe9 is not UTF-8 here"),
        ('name = "\\ud800"', "not TOML: Escaped character is not a Unicode scalar"),
        (f"name = {'9' * 5000}", "a number is too long"),
        (f"name = {'[' * 100_000}", "nested too deeply"),
        ("name = 3", r"name is an integer, 3; allowed: a string that is not empty"),
        ('name = ""', r"name is a string, ''; allowed: a string that is not empty"),
        ("name = 1979-05-27", "name is a date"),
        ('name = "a b"\nprompt = "{text}"', r"task name 'a b'; allowed: letters, digits"),
        (NAME, r"has no prompt and no messages; allowed: one of them"),
        (PROMPT + "messages = []", r"has both prompt and messages; allowed: one"),
        (NAME + 'prompt = "x"', r"prompt: prompt template 'x' must hold {text} exactly once"),
        (NAME + 'prompt = "{text}{text}"', "exactly once"),
        (NAME + "messages = []", r"\[\[messages\]\]: the last message .* role user"),
        (NAME + "[messages]", r"messages is a table, {}; allowed: \[\[messages\]\]"),
        (NAME + "messages = [1]", r"\[\[messages\]\] 1 is an integer; allowed: a table"),
        (NAME + "[[messages]]\nrol = 1", r"\[\[messages\]\] 1: unknown key 'rol', did you mean"),
        (NAME + '[[messages]]\nrole = "user"', r"\[\[messages\]\] 1: key content is missing"),
        (NAME + '[[messages]]\nrole = "tool"\ncontent = "x"\n[[messages]]\nrole = "user"\n'
         'content = "{text}"', r"\[\[messages\]\]: role 'tool' of message 1"),
        (PROMPT + 'lables = "auto"', r"unknown key 'lables', did you mean labels\? allowed: name"),
        (PROMPT + 'x = "auto"', r"unknown key 'x'; allowed: name, prompt, messages, labels, data"),
        (PROMPT + 'labels = "auto"', r'labels = "auto" needs \[data\]'),
        (PROMPT + DATA, r'key labels is missing; allowed: "auto", a list of strings, or a table'),
        (PROMPT + 'labels = "all"\n' + DATA, r"labels is a string, 'all'; allowed: \"auto\", a li"),
        (PROMPT + "labels = 3\n" + DATA, r"labels is an integer, 3; allowed"),
        (PROMPT + "labels = []\n" + DATA, r"labels is an array, \[\]; allowed"),
        (PROMPT + "labels = [1, 2]\n" + DATA, r"labels is an array, \[1, 2\]; allowed"),
        (PROMPT + "labels = {a = 1}\n" + DATA, r"labels is a table, {'a': 1}; allowed"),
        (PROMPT + 'labels = ["a"]\n', r"labels \('a',\) must be two or more different"),
        (PROMPT + 'labels = ["a", "b "]\n', r"value 'b ' of labels is blank or has space around"),
        (PROMPT + 'labels = ["a", ""]\n', r"value '' of labels is blank"),
        (PROMPT + 'labels = {a = "x", b = " y"}\n', r"label ' y' is not allowed: blank, or with"),
        (PROMPT + 'data = "a.csv"', r"\[data\] is a string; allowed: a table"),
        (LISTED + DATA + "x = 1", r"\[data\]: unknown key 'x'; allowed: train, test, hub, config"),
        (LISTED + "[data]\n", r"\[data\] has no label and no reference; allowed: one of them"),
        (LISTED + DATA + 'reference = "x"', r"\[data\] has both label and reference; allowed"),
        (LISTED + NOTES, r"labels go with label of \[data\], not with reference"),
        (LISTED + DATA.replace("train =", "config ="), r"\[data\]: config goes with hub"),
        (LISTED + '[data]\nlabel = "x"', r"\[data\]: key train is missing"),
        (LISTED + '[data]\nlabel = "x"\ntrain = "x.csv"', r"\[data\]: key text is missing"),
        (LISTED + DATA.replace('"body"', "3"), r"\[data\]: text is an integer, 3; allowed"),
        *(
            (LISTED + DATA.replace("0.1", share), r"test is .*; allowed: a file, or a share such")
            for share in ("0.0", "1.0", "-0.1", "1", "10", "nan", "inf", "true", '""', "[0.1]")
        ),
        (LISTED + DATA + "[hub]\n", r"\[hub\]: key hub is missing"),
        (PROMPT + HUB, r"\[hub\]: label goes with labels, reference with free text"),
        (LISTED + HUB.replace("label", "reference"), r"labels go with label of \[hub\]"),
        (LISTED + HUB + "labels = 3", r'\[hub\]: labels is an integer, 3; allowed: a table value'),
        (LISTED + HUB + '[hub.labels]\nx = "c"', r"label 'c' is none of the task's; allowed: 'a'"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(own, toml, message):
    with pytest.raises(TaskError, match=message) as error:
        own(toml)
    assert "\n" not in str(error.value) and "tickets.toml" in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", r"tickets.csv:1: column 'body' is missing; there are: none"),
        ("body,category\n", r"'category' holds 0 different values \(\); allowed .* 2 to 1,000"),
        ("body,category\nx,a\ny,a\n ,b\n", r"'category' holds 1 different values \('a'\); allowed"),
        (
            "body,category\n" + "".join(f"x,{n}\n" for n in range(1001)),
            r"'category' holds 1,001 different values \('0', '1', '10'\); allowed .* 2 to 1,000",
        ),
        ("body,category\nx,a\ny,\n", r"tickets.csv:3: column 'category' is blank"),
    ],
)
def test_data_that_gives_no_labels(own, rows, message):
    with pytest.raises(TaskError, match=message):
        own(AUTO, rows)


def test_a_thousand_labels_are_taken(own):
    rows = "body,category\n" + "".join(f"x,{n}\n" for n in range(1000))
    assert len(own(AUTO, rows).labels) == 1000


@pytest.mark.parametrize("path", ["missing.csv", "", "folder.csv", "~nobody-of-that-name/a.csv"])
def test_data_that_is_not_there(own, tmp_path, path):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(TaskError) as error:
        own(AUTO.replace('"tickets.csv"', json.dumps(path)))
    assert "\n" not in str(error.value)


def test_task_files_that_are_not_there(tmp_path):
    with pytest.raises(TaskError, match=r"cannot read .*a\.toml: No such file"):
        read_task_file(tmp_path / "a.toml")
    with pytest.raises(TaskError, match="is a directory; a file is needed"):
        read_task_file(tmp_path)
