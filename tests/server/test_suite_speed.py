"""What `paper` and `peers` measure on servers. One vanilla server stands for all peers: not their
speed is tested, but that they are asked the right thing and that their answers are scored. The same
server answers for `calibrate --generate`."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from raee_serve.checkpoints import local_checkpoint
from raee_serve.cli import main
from raee_serve.evaluation.documents import unseen_documents
from raee_serve.evaluation.server_process import awake
from raee_serve.evaluation.suite import paper, peer_speed
from raee_serve.evaluation.suite.dropping import LayerDropping
from raee_serve.evaluation.suite.material import Material, Source
from raee_serve.evaluation.suite.serving import raee_system, vanilla_system
from raee_serve.evaluation.summaries import BUDGETS, Part, calibrated
from raee_serve.retrieval.aggregate import QUALITY, RULES
from raee_serve.retrieval.free_text import QUALITIES, quality_choice
from raee_serve.table.store import ExitTable
from raee_serve.table.tasks import get_task
from tests.server.conftest import MODEL

pytestmark = pytest.mark.server

PROMPTS, DOCUMENTS, ROWS = 10, 2, 12
TASKS = ("demo_sentiment", "demo_summary")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("tables") / "both-kinds")
    tasks = [flag for task in TASKS for flag in ("--task", task)]
    assert main(["build", "--model", MODEL, "--table", uri, "--limit", str(ROWS), *tasks]) == 0
    return uri


@pytest.fixture(scope="module")
def material(table, tmp_path_factory) -> Material:
    scratch = tmp_path_factory.mktemp("scratch")
    source = Source(MODEL, table, "/nowhere", PROMPTS, 0, scratch, PROMPTS, DOCUMENTS)
    return Material.of(source, TASKS)


@pytest.fixture(scope="module")
def ours(table):
    with raee_system(MODEL, table) as system:
        yield system


@pytest.fixture(scope="module")
def vanilla():
    with vanilla_system(local_checkpoint(MODEL), MODEL) as system:
        yield system


def test_paper_serves_what_it_counts_offline(ours, material, monkeypatch):
    monkeypatch.setattr(paper, "raee_system", lambda model, table: nullcontext(ours))
    found = paper.run(material)
    rows = {row["way"]: row for row in found.rows}
    assert rows["full depth"]["speed"] == 1
    for rule in RULES:
        assert rows[rule]["requests/s"] > 0 and rows[rule]["latency ms"] > 0
    assert np.mean([rows[rule]["as offline"] for rule in RULES]) >= 0.9
    assert "speed" not in rows["full depth, calibrated"]
    summaries = [rows[f"summaries, {way}"] for way in ("full depth", *budget_names())]
    assert summaries[0]["depth"] == 1 and summaries[0]["demo_summary"] > 0
    assert all(0 < row["depth"] <= 1 and row["speed"] > 0 for row in summaries)


def budget_names() -> list[str]:
    return [f"quality {budget:g}" for budget in BUDGETS]


def test_peers_are_asked_the_same_prompts(ours, vanilla, material, monkeypatch):
    started = []

    def stand_in(checkpoint, model, flags=()):
        started.append((checkpoint.name, *flags))
        return nullcontext(vanilla)

    monkeypatch.setattr(peer_speed, "raee_system", lambda model, table: nullcontext(ours))
    monkeypatch.setattr(peer_speed, "vanilla_system", stand_in)
    rows, notes = peer_speed.measured(material, LayerDropping(material))
    of_kind = {
        kind: {row["way"]: row for row in rows if row["prompts"] == kind}
        for kind in ("label words", "summaries")
    }
    for by_way in of_kind.values():
        assert list(by_way) == [
            "vanilla vLLM",
            "retrieved exits",
            "static truncation",
            "layers dropped",
            "raee-serve at full depth",
            "n-gram drafts",
            "int8 weights",
        ]
    assert len(rows) == 2 * len(by_way)
    num_layers = material.backbone.num_layers
    shorter = []
    for quality, by_way in zip(("accuracy", "ROUGE-L"), of_kind.values(), strict=True):
        assert all(0 <= row[quality] <= 1 and row["speed"] > 0 for row in by_way.values())
        same, other = by_way["vanilla vLLM"], by_way["raee-serve at full depth"]
        assert other["depth"] == 1 and other[quality] == pytest.approx(same[quality], abs=0.1)
        cut = by_way["static truncation"]["depth"]
        assert cut == by_way["layers dropped"]["depth"]
        n = round(cut * num_layers)
        assert n == min(round(by_way["retrieved exits"]["depth"] * num_layers), num_layers - 1)
        shorter += [(f"static-truncation-{n}",), (f"layers-dropped-{n}",)]
    whole, *peers, drafts, int8 = started
    assert whole == (material.checkpoint.name,) and drafts[1] == "--speculative-config"
    assert peers == shorter and int8 == ("int8",) and notes


def test_budgets_of_an_evaluation_are_what_answers_keep(ours, table, tmp_path):
    task = get_task("demo_summary")
    opened = ExitTable.open(table)
    unseen = {task.name: unseen_documents(opened, task, None, DOCUMENTS)}
    part = Part(MODEL, table, (task,), {})
    args = SimpleNamespace(
        out=tmp_path,
        budgets=[0.51, 2.0],
        limit=DOCUMENTS,
        words=400,
        max_tokens=16,
        concurrency=2,
        calibrate=DOCUMENTS,
    )
    with awake(ours.process):
        found = asyncio.run(calibrated(args, part, ours.url, opened, unseen))
        answers = (tmp_path / f"{MODEL}.calibration.jsonl").read_bytes()
        again = asyncio.run(calibrated(args, part, ours.url, opened, unseen))
    assert found[task.name][0.51].quality in QUALITIES
    assert found[task.name][2.0] is None  # twice full depth's: no exit is to be taken
    assert (tmp_path / f"{MODEL}.calibration.jsonl").read_bytes() == answers and again == found
    args.calibrate = 0
    args.out = tmp_path / "uncalibrated"
    asked = asyncio.run(calibrated(args, part, ours.url, opened, {task.name: []}))
    assert asked == {task.name: {0.51: quality_choice(0.51), 2.0: quality_choice(2.0)}}


def test_a_budget_is_chosen_by_answers(ours, table, capsys):
    """Last, for what it stores changes the table."""
    command = ["calibrate", "--table", table, "--task", "demo_summary", "--budget", "depth<=1"]
    command += ["--generate", str(DOCUMENTS), "--model", MODEL, "--base-url", ours.url]
    with awake(ours.process):
        assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"{DOCUMENTS} documents that the table lacks" in printed
    settings = [line.split() for line in printed.splitlines() if "quality, k 24" in line]
    assert len(settings) > 1
    choice = ExitTable.open(table).metadata.choices["demo_summary"]
    assert choice.rule == QUALITY and choice.quality in QUALITIES
