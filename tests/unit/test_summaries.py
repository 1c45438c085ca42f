"""Summaries: turns are kept and not mixed up, rows are scored against full depth's."""

import json
from dataclasses import replace

import numpy as np
import pytest

from raee_serve.errors import RaeeError
from raee_serve.evaluation.asking import Answer
from raee_serve.evaluation.documents import answer_settings
from raee_serve.evaluation.metrics import rouge, rouge_l
from raee_serve.evaluation.paired import compare_scores
from raee_serve.evaluation.summaries import known_exits, main, write
from raee_serve.evaluation.summary_report import (
    as_fields,
    as_markdown,
    draw,
    has_loop,
    over_tasks,
    published,
    results,
)
from raee_serve.evaluation.summary_turns import FULL_DEPTH, Kept, Turn, rows_of
from raee_serve.exits.choice import Choice
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.table.schema import EncoderIdentity, TableMetadata, TaskEntry
from raee_serve.tasks.registry import get_task

pytestmark = pytest.mark.unit

SETTINGS = {"model": "m", "tasks": {"notes": "abc"}, "limit": 3}
REFERENCES = ["the dog sleeps", "a cat runs away", "rain all day"]


def turn(row: str, first: int, texts: list[str], exit_layer: int = 4, seconds: float = 2.0) -> Turn:
    answers = tuple(Answer(text, 10, 5, exit_layer, 4, "override", "-", 0.1) for text in texts)
    return Turn("notes", row, first, seconds, answers)


def test_rows_are_full_depth_each_exit_twice_and_the_budgets():
    rows = rows_of([2, 3], {0.98: None, 0.9: Choice(7, 0.85)})
    assert [row.name for row in rows] == [
        "full depth",
        *("layer 2", "layer 3"),
        *("layer 2, shortcut", "layer 3, shortcut"),
        *("budget 0.98", "budget 0.9"),
    ]
    assert rows[3].raee == {"task": None, "exit_layer": 2, "head": "shortcut"}
    assert rows[-1].raee == {"k": 7, "budget": 0.85, "explain": True}
    assert rows[-2].raee == FULL_DEPTH.raee  # which alone keeps so much
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("shortcuts", "exits"), [(((), ()), [15, 20, 25]), (((22,), (18, 22)), [18, 22])]
)
def test_fixed_exits_are_where_shortcuts_are(shortcuts, exits):
    tasks = [get_task("xsum_chat"), get_task("cnndm_chat")]
    entries = {
        task.name: replace(TaskEntry.of(task, (), layers), shortcut_layers=short)
        for task, layers, short in zip(tasks, ((15, 25, 30), (20, 30)), shortcuts, strict=True)
    }
    backbone = BackboneIdentity("LlamaForCausalLM", 30, "00" * 32)
    metadata = TableMetadata(backbone, EncoderIdentity("minilm", 384, "00" * 32), entries)
    assert known_exits(metadata, tasks) == exits


def test_turns_come_back_as_they_were_kept(tmp_path):
    path = tmp_path / "new" / "m.jsonl"
    kept = Kept(path, SETTINGS)
    kept.add(turn("full depth", 0, ["ein\u2028Satz", ""]))
    again = Kept(path, SETTINGS)
    assert again.turns == kept.turns
    assert again.has("notes", "full depth", 0)
    assert not again.has("notes", "full depth", 2) and not again.has("notes", "layer 2", 0)


def test_half_a_line_is_asked_again(tmp_path):
    path = tmp_path / "m.jsonl"
    Kept(path, SETTINGS).add(turn("full depth", 0, ["a"]))
    with path.open("a") as file:
        file.write('{"task": "notes", "row": "lay')
    kept = Kept(path, SETTINGS)
    assert len(kept.turns) == 1
    kept.add(turn("layer 2", 0, ["b"]))
    assert [t.row for t in Kept(path, SETTINGS).turns] == ["full depth", "layer 2"]


def test_answers_under_other_settings_are_not_mixed_in(tmp_path):
    path = tmp_path / "m.jsonl"
    Kept(path, SETTINGS)
    with pytest.raises(RaeeError, match="another --out"):
        Kept(path, {**SETTINGS, "limit": 4})


def test_an_empty_file_is_nobodys(tmp_path):
    (tmp_path / "m.jsonl").touch()
    with pytest.raises(RaeeError, match="unknown settings"):
        Kept(tmp_path / "m.jsonl", SETTINGS)


def test_rows_are_scored_beside_full_depth():
    full = [turn("full depth", 2, REFERENCES[2:]), turn("full depth", 0, REFERENCES[:2])]
    early = [turn("layer 2", 0, ["the dog sleeps", "no", "no"], exit_layer=2, seconds=2.0)]
    first, second = results(rows_of([2], {})[:2], full + early, REFERENCES)
    assert first.rougeL == first.kept == first.depth == first.speedup == 1
    assert (first.difference, first.low, first.high) == (0, 0, 0)
    assert second.rouge2 == second.kept == pytest.approx(1 / 3)
    assert second.difference == pytest.approx(-2 / 3) and second.low == -1 and second.high == 0
    assert second.depth == 0.5 and second.speedup == 2 and second.reasons == {"override": 3}
    assert second.tokens_per_s == pytest.approx(3 * 15 / 2)
    json.dumps(as_fields(second), allow_nan=False)


def test_full_depth_that_says_nothing_leaves_nothing_to_keep():
    [row] = results([FULL_DEPTH], [turn("full depth", 0, ["", "", ""])], REFERENCES)
    assert row.rougeL == row.kept == 0


def test_table_and_picture(tmp_path):
    rows = rows_of([2, 3], {0.9: Choice(24, 0.9)})
    turns = [turn(row.name, 0, REFERENCES) for row in rows]
    found = {"m": {"xsum_chat": results(rows, turns, REFERENCES)}}
    table = as_markdown(found)
    assert "### m, xsum_chat" in table and "The paper: ROUGE-L 7.15." in table
    lines = table.splitlines()
    assert len([line for line in lines if line.startswith("| layer")]) == 4
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_one_backbone_after_the_other_makes_one_report(tmp_path):
    own = results([FULL_DEPTH], [turn("full depth", 0, REFERENCES)], REFERENCES)
    other = results([FULL_DEPTH], [turn("full depth", 0, ["the dog", "", ""])], REFERENCES)
    write({"a": {"xsum_chat": other}}, tmp_path)
    write({"b": {"xsum_shots": other}}, tmp_path)
    written = write({"a": {"xsum_chat": own}}, tmp_path)
    models = json.loads(written.splitlines()[-1])["models"]
    assert models["a"]["xsum_chat"]["rows"] == [as_fields(row) for row in own]
    assert models["b"]["xsum_shots"]["rows"] == [as_fields(row) for row in other]
    assert json.loads((tmp_path / "summaries.json").read_text())["models"] == models
    assert "### b, xsum_shots" in (tmp_path / "summaries.md").read_text()


def test_what_was_begun_again_counts_both_runs():
    looped = replace(turn("layer 2", 0, ["x"], exit_layer=2).answers[0], restarted=True)
    early = turn("layer 2", 0, REFERENCES[:2], exit_layer=2)
    turns = [
        turn("full depth", 0, REFERENCES),
        replace(early, answers=(*early.answers, looped)),
    ]
    _, found = results(rows_of([2], {})[:2], turns, REFERENCES)
    assert found.depth == pytest.approx((0.5 + 0.5 + 1.5) / 3)
    assert found.restarted == pytest.approx(1 / 3)


def test_answers_that_loop_are_counted():
    assert has_loop("He said that " + "it is so, " * 3) and has_loop("In 2000-2000-2000-2000-")
    assert not has_loop("no no no") and not has_loop("") and not has_loop(REFERENCES[0])
    texts = [REFERENCES[0], "and on " * 9, REFERENCES[2]]
    [row] = results([FULL_DEPTH], [turn("full depth", 0, texts)], REFERENCES)
    assert row.loops == pytest.approx(1 / 3) and row.restarted == 0


def test_tasks_count_alike():
    """Of one task the shallow row keeps a third and is twice as fast, of the other it keeps all
    and takes as long; full depth takes 2 s for the three documents of either."""
    rows = rows_of([2], {})[:2]
    full = turn("full depth", 0, REFERENCES)
    poor = turn("layer 2", 0, ["the dog sleeps", "no", "no"], exit_layer=2, seconds=1.0)
    good = turn("layer 2", 0, REFERENCES, exit_layer=3)
    tasks = {
        "a": results(rows, [full, poor], REFERENCES),
        "b": results(rows, [full, good], REFERENCES),
    }
    first, second = over_tasks(tasks)
    assert (first.row, first.kept, first.depth, first.speedup) == ("full depth", 1, 1, 1)
    assert second.kept == second.rougeL == pytest.approx(2 / 3)
    assert second.depth == (0.5 + 0.75) / 2 and second.speedup == pytest.approx(4 / 3)
    assert "### m, a and b" in as_markdown({"m": tasks})
    tasks["b"] = tasks["b"][:1]
    assert [row.row for row in over_tasks(tasks)] == ["full depth"]


def test_the_paper_has_two_data_sets():
    assert published("cnndm_shots") == 0.1401
    assert published("demo_summary") is None


def test_rouge_of_each_answer():
    scores = rouge(["the dogs sleep", "x"], ["the dog sleeps", "y"])
    assert scores["rouge1"].tolist() == scores["rougeL"].tolist() == [1, 0]  # words are stemmed
    assert rouge_l(["the dogs sleep", "x"], ["the dog sleeps", "y"]) == 0.5
    assert rouge_l([], []) == 0


def test_scores_that_differ_by_chance_alone():
    rng = np.random.default_rng(1)
    theirs = rng.uniform(size=200)
    same = compare_scores(theirs + rng.normal(0, 0.1, 200), theirs)
    assert same.low < 0 < same.high and same.p > 0.05
    better = compare_scores(theirs + rng.normal(0.05, 0.1, 200), theirs)
    assert 0.03 < better.low < better.difference < better.high < 0.07 and better.p < 0.001


def test_who_only_continues_stops_at_the_end_of_the_line():
    assert answer_settings(get_task("xsum_shots"), 8) == {"max_tokens": 8, "stop": ["\n"]}
    assert answer_settings(get_task("xsum_chat"), 8) == {"max_tokens": 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "smollm2-135m", "--task", "demo_sentiment"], "allowed: free text"),
        (["--model", "elsewhere/model"], "name tasks for elsewhere/model"),
        (["--data", "/nowhere"], "/nowhere/cnndm/test.jsonl"),
        (["--calibrate", "-1"], "--calibrate -1 at least 0"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["--out", str(tmp_path), *arguments])
