"""`raee-serve eval suite` on a tiny random backbone with the real encoder and the demo task."""

import csv
import json
import random
import shutil
import sys
from dataclasses import replace
from html import escape

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raee_serve.cli import main
from raee_serve.cut import checkpoint_of, cut_checkpoint
from raee_serve.errors import RaeeError, TaskError
from raee_serve.evaluation.asking import Answer
from raee_serve.evaluation.suite import findings, shift
from raee_serve.evaluation.suite.backbone import StudiedBackbone
from raee_serve.evaluation.suite.command import STUDIES
from raee_serve.evaluation.suite.findings import Findings, Picture
from raee_serve.evaluation.suite.material import Material, Source
from raee_serve.evaluation.suite.peers import confident
from raee_serve.evaluation.suite.quantizing import int8_checkpoint
from raee_serve.evaluation.suite.report import draw
from raee_serve.evaluation.suite.scores import tasks_averaged
from raee_serve.evaluation.suite.serving import System, Timed, Way, in_turns, predicted, speed
from raee_serve.evaluation.suite.summarised import Documents
from raee_serve.retrieval.leave_one_out import LABEL_VOTE
from raee_serve.table.probe import LayerProbe
from raee_serve.table.schema import row_id
from raee_serve.table.tasks import get_task
from tests.tiny import tokenized_gemma3, tokenized_llama

pytestmark = pytest.mark.unit

TASK = "demo_sentiment"
LONG_PROMPTS = [list(range(2, 22)), list(range(30, 44))]
"""Longer than the window of `tokenized_gemma3`."""
PROMPTS = [[1, 5, 9, 7], [1, 300, 20], [1, 4, 4, 8, 77, 31]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, smollm2):
    return tokenized_llama(tmp_path_factory.mktemp("llama") / "tiny", smollm2)


@pytest.fixture(scope="module")
def uri(checkpoint, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("table") / "exits")
    assert main(["build", "--model", str(checkpoint), "--task", TASK, "--table", uri]) == 0
    return uri


@pytest.fixture(scope="module")
def suite(checkpoint, uri, tmp_path_factory):
    """Runs studies into one folder; the exit code."""
    out = tmp_path_factory.mktemp("studies")
    cache = tmp_path_factory.mktemp("cache")

    def run(name, *more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAEE_CACHE", str(cache))
            command = ["eval", "suite", name, "--model", str(checkpoint), "--table", uri]
            command += ["--data", "/nowhere", "--limit", "12", "--served", "0", "--documents", "0"]
            return main([*command, "--out", str(out), *more])

    run.out = out
    return run


def rows_of(suite, name):
    kept = json.loads((suite.out / f"{name}.json").read_text())
    with (suite.out / f"{name}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(kept["rows"])
    return kept["rows"]


def test_every_study_leaves_its_findings_and_a_place_in_the_report(suite):
    assert suite("all") == 0
    report = (suite.out / "report.html").read_text()
    tables = (suite.out / "report.md").read_text()
    for name, study in STUDIES.items():
        kept = json.loads((suite.out / f"{name}.json").read_text())
        assert kept["rows"] and kept["settings"]["prompts"] == {TASK: 12}
        assert f"## {name}\n{study.question}\n" in tables
        assert f'<h2 id="{name}">' in report and escape(study.question) in report
        assert (suite.out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        columns = {column for row in kept["rows"] for column in row}
        for drawn in (kept["picture"], *kept["beside"]):
            assert {drawn["x"], drawn["y"], drawn["series"], *(drawn["error"] or ())} <= columns
    assert "http" not in report  # it needs nothing else


def test_a_study_is_run_again_only_for_other_settings(suite, capsys):
    suite("k")
    before = (suite.out / "k.json").stat().st_mtime_ns
    capsys.readouterr()
    suite("k")
    assert "k: kept from before" in capsys.readouterr().out
    assert (suite.out / "k.json").stat().st_mtime_ns == before
    suite("k", "--seed", "1")
    assert (suite.out / "k.json").stat().st_mtime_ns != before


def test_a_larger_table_ends_where_the_whole_one_is(suite):
    suite("all")
    whole = [row for row in rows_of(suite, "size") if row["way"] == "earliest"][-1]
    paper = {row["way"]: row for row in rows_of(suite, "paper")}
    assert (whole["accuracy"], whole["depth"]) == (
        paper["earliest"]["accuracy"],
        paper["earliest"]["depth"],
    )
    assert paper["full depth"]["depth"] == 1 and paper[LABEL_VOTE]["depth"] == 0


def test_without_a_bound_nothing_falls_back(suite):
    suite("shift")
    rows = rows_of(suite, "shift")
    assert all(row["fall back"] == 0 for row in rows if row["distance bound"] == "none")
    assert len(rows) == 2 * (1 + len(shift.EDITS))


def test_exact_search_is_what_indexes_are_compared_with(suite):
    suite("index")
    exact, *indexes = rows_of(suite, "index")
    assert exact["recall"] == 1 and exact["index_mb"] == 0
    assert all(0 < row["recall"] <= 1 for row in indexes)


def test_evidence_says_how_far_one_label_has_the_majority(suite):
    suite("evidence")
    rows = rows_of(suite, "evidence")
    assert all(0.5 <= row["largest label"] <= 1 for row in rows if "rule" in row)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "1"], "--limit is 1; allowed: at least 2"),
        (["--served", "3"], "--served is 3; allowed: 0, or at least 10"),
        (["--documents", "1"], "--documents is 1; allowed: 0, or at least 2"),
    ],
)
def test_too_little_to_measure_is_one_line(suite, capsys, more, message):
    assert suite("k", *more) == 1
    assert message in capsys.readouterr().err


def test_too_few_prompts_are_refused_before_anything_is_served(suite, capsys):
    assert suite("paper", "--limit", "9", "--served", "400") == 1
    assert f"9 prompts of task {TASK} to measure speed on; allowed: at least 10" in (
        capsys.readouterr().err
    )


def test_without_matplotlib_nothing_is_begun(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert suite("k", "--out", str(tmp_path / "new")) == 1
    assert "install raee-serve[plot]" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_texts_of_rows_that_the_data_does_not_hold(checkpoint, uri, tmp_path):
    material = Material.of(Source(str(checkpoint), uri, "/nowhere", 2, 0, tmp_path), [TASK])
    task = material.tasks[0]
    rows = material.some_rows(task, 3)
    keys = material.texts(task, rows)
    assert [
        row_id(TASK, text, int(gold)) for text, gold in zip(keys, rows.golds, strict=True)
    ] == rows.ids
    with pytest.raises(TaskError, match=f"1 of 3 rows of task {TASK}"):
        material.texts(task, replace(rows, ids=["0" * 32, *rows.ids[1:]]))


def test_a_table_of_another_backbone_is_one_line(suite, smollm2, capsys):
    assert suite("k", "--model", str(smollm2)) == 1
    assert "was built for backbone" in capsys.readouterr().err


def test_layers_left_out_leave_the_cut_checkpoint(checkpoint, tmp_path):
    backbone = StudiedBackbone(checkpoint, torch.float32)
    whole = backbone.label_logprobs(PROMPTS, [3, 4, 5])
    cut = LayerProbe(cut_checkpoint(checkpoint, 2, tmp_path / "cut"), torch.float32)
    with backbone.without(range(3, backbone.num_layers + 1)):
        found = backbone.label_logprobs(PROMPTS, [3, 4, 5])
    np.testing.assert_allclose(found, cut.label_logprobs(PROMPTS, [3, 4, 5]), atol=1e-5)
    np.testing.assert_allclose(backbone.label_logprobs(PROMPTS, [3, 4, 5]), whole, atol=1e-6)


@pytest.mark.parametrize("left_out", [(1,), (1, 3), (4,)])
def test_a_checkpoint_with_layers_left_out_answers_as_the_backbone_without(
    tmp_path, smollm2, left_out
):
    """Of layers of two kinds: the decoder must go on to tell them apart."""
    source = tokenized_gemma3(tmp_path / "gemma3", smollm2)
    backbone = StudiedBackbone(source, torch.float32)
    kept = [layer for layer in range(1, 5) if layer not in left_out]
    other = LayerProbe(checkpoint_of(source, kept, tmp_path / "kept"), torch.float32)
    with backbone.without(left_out):
        found = backbone.label_logprobs(LONG_PROMPTS, [3, 4, 5])
    np.testing.assert_allclose(found, other.label_logprobs(LONG_PROMPTS, [3, 4, 5]), atol=1e-5)


def test_mean_states_and_influence_are_of_real_tokens_only(checkpoint):
    backbone = StudiedBackbone(checkpoint, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    states = backbone.mean_states(PROMPTS, [0, 1, 2])
    similarity = [[] for _ in range(backbone.num_layers)]
    for prompt, found in zip(PROMPTS, states, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        expected = [hidden[layer][0].mean(dim=0).numpy() for layer in (0, 1, 2)]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        for layer in range(backbone.num_layers - 1):  # the last one is given after the norm
            pair = (hidden[layer][0], hidden[layer + 1][0])
            similarity[layer] += torch.cosine_similarity(*pair, dim=-1).tolist()
    influence = backbone.block_influence(PROMPTS)
    for layer in range(backbone.num_layers - 1):
        assert influence[layer] == pytest.approx(1 - np.mean(similarity[layer]), abs=1e-5)


def test_a_mean_accuracy_is_of_tasks_scored_by_it():
    cola, sst2 = get_task("cola"), get_task("sst2")
    assert tasks_averaged([cola, sst2]) == [sst2]
    assert tasks_averaged([cola]) == [cola]


def test_a_confidence_threshold_exits_where_it_is_sure():
    scores = np.log([[[0.6, 0.4], [0.1, 0.9], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5], [0.7, 0.3]]])
    sure = confident(scores, 0.8)
    assert sure.predicted.tolist() == [1, 0] and sure.depth == pytest.approx((2 + 3) / 6)
    assert confident(scores, 0.5).depth == pytest.approx(1 / 3)


@pytest.mark.parametrize("edit", shift.EDITS.values(), ids=shift.EDITS)
def test_edits_are_seeded_and_touch_some_words(edit):
    text = " ".join(f"word{i}" for i in range(100))
    edited = edit(text, random.Random(3))
    assert edited == edit(text, random.Random(3)) != text
    assert len(set(text.split()) & set(edited.split())) >= 60


def test_findings_know_their_settings():
    found = Findings([{"a": 1, "b": "x"}], Picture("a", "b", "c", ("low", "high")))
    text = findings.as_json("k", "Why?", {"limit": None}, found)
    assert findings.made_with(text, {"limit": None})
    assert not findings.made_with(text, {"limit": 5})


def test_pictures_stand_beside_each_other(tmp_path):
    rows = [{"way": "a", "depth": 1, "speed": 1.0, "accuracy": 0.5}, {"way": "b", "depth": 0.5}]
    first = Picture("depth", "accuracy", "way")
    widths = []
    for beside in ([], [Picture("speed", "accuracy", "way")]):
        draw(Findings(rows, first, beside=beside), "What?", tmp_path / "x.png")
        png = (tmp_path / "x.png").read_bytes()
        widths.append(int.from_bytes(png[16:20], "big"))
    assert widths[1] == 2 * widths[0]


@pytest.mark.parametrize("joined", [True, False])
def test_rows_without_figures_are_not_drawn(tmp_path, joined):
    picture = Picture("depth", "accuracy", "way", ("low", "high"), joined=joined)
    shown = {"way": "a", "depth": 1, "accuracy": 0.5, "low": 0.4, "high": 0.6}
    files = []
    for hidden in ([], [{"way": "b", "depth": 0.5, "accuracy": ""}, {"way": "c"}]):
        files.append(tmp_path / f"{len(hidden)}.png")
        draw(Findings([shown, *hidden], picture), "What?", files[-1])
    assert files[0].read_bytes() == files[1].read_bytes()


def timed(texts, seconds, exit_layer=4):
    """One prompt asked alone, the others in `seconds`."""
    answers = [Answer(text, 10, 1, exit_layer, 4, "override", "-", 0.02) for text in texts]
    return Timed(answers, [0.02], seconds)


def test_speed_is_that_of_the_same_prompts():
    theirs = {"a": timed(["x"] * 9, 4.0), "b": timed(["x"] * 5, 2.0)}
    ours = {"a": timed(["x"] * 9, 1.0, 1), "b": timed(["x"] * 5, 2.0, 3)}
    assert speed(ours, theirs) == {"requests/s": 4.0, "speed": 2.0, "latency ms": 20.0}
    assert speed(theirs, theirs)["speed"] == 1
    assert (ours["a"].depth, ours["b"].depth) == (0.25, 0.75)


def test_speed_needs_two_prompts():
    way = Way(System("http://nowhere", "m"), {})
    with pytest.raises(RaeeError, match="1 prompts of task demo_sentiment"):
        in_turns([way], {get_task(TASK): ["only one"]})


def test_answers_that_are_no_label_word_are_wrong():
    answers = timed([" great", "terr", "", "else"], 1.0).answers
    assert predicted(get_task(TASK), answers).tolist() == [1, 0, -1, -1]


def test_summaries_are_scored_by_task_and_over_all_documents():
    references = {"one": ["the dog sleeps", "rain"], "two": ["a cat", "a bird"]}
    documents = Documents({}, references)
    way = {"one": timed(references["one"], 1.0), "two": timed(["a cat", "x"], 1.0)}
    row = documents.scored(way, [0.5, 1.0])
    assert (row["one"], row["two"], row["ROUGE-L"], row["depth"]) == (1.0, 0.5, 0.75, 0.75)
    assert row["low"] == 0.5 and row["high"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_near_the_whole_ones(checkpoint, tmp_path, dtype):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    whole = {k: t.to(dtype) for k, t in load_file(source / "model.safetensors").items()}
    save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    int8 = int8_checkpoint(source, tmp_path / "int8")
    found = load_file(int8 / "model.safetensors")
    assert (int8 / "tokenizer.json").is_file()
    for name, weight in whole.items():
        if not name.endswith("_proj.weight"):
            torch.testing.assert_close(found[name], weight)
            continue
        assert found[name].dtype is torch.int8
        scale = found[f"{name}_scale"]
        assert scale.shape == (len(weight), 1) and scale.dtype is dtype
        away = (found[name].float() * scale.float() - weight.float()).abs() / scale.float()
        # The largest weight of a channel may lie a little beyond 127 steps of the rounded scale.
        most = torch.where(found[name].abs() == 127, 0.5 + 127 * torch.finfo(dtype).eps, 0.5 + 1e-4)
        assert (away <= most).all()
    kept = json.loads((int8 / "config.json").read_text())
    assert kept["quantization_config"]["quant_method"] == "compressed-tensors"
