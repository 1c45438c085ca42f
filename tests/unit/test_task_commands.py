"""`task list` and `task check`, and what other commands say of task files."""

import json

import pytest

from raee_serve.cli import main
from raee_serve.tasks import check_command
from raee_serve.tasks.registry import TASKS

pytestmark = pytest.mark.unit

TOML = """
name = "tickets"
prompt = "{text}\\nIntent:"
labels = "auto"
[data]
train = "tickets.csv"
text = "body"
label = "category"
"""


@pytest.fixture
def tickets(tmp_path, monkeypatch):
    """In a directory with tickets.toml; writes the rows of its data."""
    monkeypatch.chdir(tmp_path)

    def write(rows, toml=TOML):
        (tmp_path / "tickets.toml").write_text(toml)
        (tmp_path / "tickets.csv").write_text("body,category\n" + "".join(rows))

    return write


def rows(count, labels=("refund money", "refund nothing")):
    return [f"text {n},{labels[n % len(labels)]}\n" for n in range(count)]


def check(capsys, *flags):
    """The exit code, and the report as an object."""
    code = main(["task", "check", "tickets.toml", "--model", "smollm2-135m", "--json", *flags])
    out = capsys.readouterr()
    assert not code or out.out, out.err
    return code, json.loads(out.out)


def test_list_has_the_shipped_tasks(capsys, tickets):
    tickets(rows(4))
    assert main(["task", "list", "--json", "tickets.toml"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == [*TASKS, "tickets"]
    assert listed["cr"] == {
        "kind": "labels",
        "shipped": True,
        "labels": ["terrible", "great"],
        "data": ["ROOT/cr/train.jsonl", "hub SetFit/CR"],
    }
    assert listed["tickets"]["shipped"] is False
    assert main(["task", "list"]) == 0
    assert "mpqa                 labels     yes      terrible, great; ROOT/mpqa/train.jsonl" in (
        capsys.readouterr().out
    )


def test_check_counts_and_advises(capsys, tickets):
    long = "word " * 300
    tickets([*rows(60), "text 0,refund money\n", " ,refund\n", f"{long},refund nothing\n",
             "text 1,refund money\n", "again,other\n"])  # fmt: skip
    code, report = check(capsys)
    assert code == 0 and report["faults"] == []
    assert report["prompt"] == "text 0\nIntent:" and report["prompt_tokens"] == 7
    assert report["first_answer"] == [" refund", " money"]
    assert (report["rows"], report["test_rows"], report["blank"]) == (64, None, 1)
    assert (report["duplicates"], report["contradicting"]) == (1, 1)
    assert report["labels"] == {"other": 1, "refund money": 32, "refund nothing": 31}
    assert report["few"] == ["other"] and report["plain_head"] is False
    assert report["encoder"] == {"window": 256, "longer": 1}
    assert report["model"] == {"window": 8192, "longer": 0}
    advice = " / ".join(report["advice"])
    for part in ("labels with fewer than 5 rows, add some: 'other'", "keep one of them: 1",
                 "add test = 0.1", "texts longer than the encoder's 256 tokens: 1;"):  # fmt: skip
        assert part in advice


def test_check_compares_train_and_test(capsys, tickets):
    tickets(rows(40), TOML.replace("text =", 'test = "tickets.csv"\ntext ='))
    _, report = check(capsys)
    assert (report["rows"], report["test_rows"], report["in_both"]) == (40, 40, 40)
    assert any(
        "training texts that are test texts too, take them out: 40" in advice
        for advice in report["advice"]
    )


def test_check_for_a_reader(capsys, tickets):
    tickets(rows(60))
    assert main(["task", "check", "tickets.toml", "--model", "smollm2-135m"]) == 0
    out = capsys.readouterr().out
    assert "  | text 0\n  | Intent:\nits answer, 2 tokens: ' refund', ' money'\n" in out
    assert "60 training rows, no test rows" in out and out.endswith("can be built\n")
    assert "2 labels: refund money 30, refund nothing 30" in out
    assert "plain head: labels share first tokens" in out


@pytest.mark.parametrize(
    ("count", "toml", "fault"),
    [
        (60, TOML.replace("Intent:", "word " * 9000), "exceed the backbone's 8192 tokens"),
        (4, TOML, "nothing could answer: no probes, because it has 4 rows"),
    ],
)
def test_check_ends_with_1_for_what_cannot_be_built(capsys, tickets, count, toml, fault):
    tickets(rows(count), toml)
    code, report = check(capsys)
    assert code == 1 and fault in report["faults"][0]


def test_a_prompt_that_ends_in_a_space_is_advised_against(capsys, tickets):
    tickets(rows(60), TOML.replace("Intent:", "Intent: "))
    _, report = check(capsys)
    assert any("prompt ends in a space" in advice for advice in report["advice"])


def test_few_rows_with_labels_that_differ_are_answered_by_the_plain_head(capsys, tickets):
    tickets(rows(4, ("red", "blue")))
    code, report = check(capsys)
    assert code == 0 and report["plain_head"] is True
    assert "the plain head alone will answer: no probes" in report["advice"][0]


def test_check_of_free_text_in_a_chat(capsys):
    assert main(["task", "check", "demo_summary", "--model", "smollm2-135m"]) == 0
    out = capsys.readouterr().out
    assert "  | user: Summarise in one sentence:" in out and "labels" not in out
    code = main(["task", "check", "demo_summary", "--model", "gemma3-270m"])
    assert code == 1
    assert "cannot be built: this backbone's tokenizer has no chat template" in (
        capsys.readouterr().out
    )


def test_check_without_data(capsys, monkeypatch):
    monkeypatch.setattr(check_command, "load_model", None)
    assert main(["task", "check", "mpqa", "--model", "smollm2-135m"]) == 1
    assert "mpqa is shipped without its data; give --data ROOT" in capsys.readouterr().err


def test_build_names_rows_without_text_and_bad_rows(capsys, tickets):
    flags = ["--model", "nothing/at/all", "--task", "tickets.toml", "--table", "table"]
    tickets([*rows(4), ",\n"])
    assert main(["build", *flags]) == 1
    assert "tickets: rows left out for want of a text: 1" in capsys.readouterr().out
    tickets(["x,\n"])
    assert main(["build", *flags]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "tickets.csv:2: column 'category' is blank" in error
