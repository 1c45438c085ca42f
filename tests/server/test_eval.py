"""`raee-serve eval` against the running server, and how it fails."""

import json

import pytest

from raee_serve.cli import main
from tests.server.conftest import MODEL, NUM_LAYERS

pytestmark = pytest.mark.server

TASKS = ("demo_sentiment", "demo_chat_sentiment")


def test_the_last_line_is_one_json_object(served, capsys):
    tasks = [part for task in TASKS for part in ("--task", task)]
    limits = ["--limit", "6", "--concurrency", "4", "--k", "8", "--budgets", "0.9"]
    assert main(["eval", "--model", MODEL, "--base-url", served.url, *tasks, *limits]) == 0
    *_, header, first, second, last = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["task", "n"]
    assert first.startswith("demo_sentiment") and second.startswith("demo_chat_sentiment")
    results = json.loads(last)["tasks"]
    assert tuple(results) == TASKS
    for result in results.values():
        assert result["n"] == 6 == sum(result["reasons"].values())
        assert result["num_layers"] == NUM_LAYERS > result["mean_exit_layer"] >= 1
        assert 0 <= result["raee_accuracy"] <= 1 and 0 <= result["full_accuracy"] <= 1
        assert result["full_rps"] > 0 and result["raee_rps"] > 0
    assert results["demo_chat_sentiment"]["full_accuracy"] >= 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sst3"], "unknown task 'sst3'"),
        (["--task", "demo_sentiment"], "give --table DIR, or --base-url URL"),
        (["--task", "demo_sentiment", "--base-url", "http://x", "--port", "1"], "--port 1"),
        (["--task", "sst2", "--data", "/nowhere"], "/nowhere/sst2/test.jsonl"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(capsys, arguments, message):
    assert main(["eval", "--model", MODEL, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_server_that_does_not_start_shows_the_end_of_its_log(capsys):
    command = ["eval", "--model", MODEL, "--table", "t", "--task", "demo_sentiment"]
    assert main([*command, "--watch-table", "0"]) == 1
    told = capsys.readouterr().err
    assert "ended with exit code 1" in told and "--watch-table is 0" in told
