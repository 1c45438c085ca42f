"""`raee-serve preview` and the loading it shares with the server, on a real table and encoder."""

import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer

from raee_serve.cli import main
from raee_serve.errors import RaeeError
from raee_serve.fingerprint import identify_backbone
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.task_index import MIN_BOUND
from raee_serve.server.access import Access
from raee_serve.server.loading import load_gate
from raee_serve.server.settings import DepthSettings
from raee_serve.server.valves import Valves
from tests.tiny import tokenized_llama
from tests.unit.label_tables import MANY, id_of, new_table, put_labels

pytestmark = pytest.mark.unit

TEXTS = ["a wonderful film", "a dull film", "a moving film", "a stupid film"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, smollm2) -> Path:
    return tokenized_llama(tmp_path_factory.mktemp("tiny") / "model", smollm2)


@pytest.fixture(scope="module")
def table(checkpoint, tmp_path_factory) -> str:
    """Four rows, every one right at layer 2 only; too few for probes."""
    uri = str(tmp_path_factory.mktemp("tables") / "films")
    encoder, tokenizer = Encoder("minilm"), AutoTokenizer.from_pretrained(checkpoint)
    exits = new_table(uri, identify_backbone(checkpoint), encoder)
    put_labels(exits, "sst2", TEXTS, encoder, tokenizer)
    put_labels(exits, "mr", MANY, encoder, tokenizer)
    return uri


@pytest.fixture
def preview(checkpoint, table, capsys):
    """The lines that the command prints."""

    def run(*arguments, status=0):
        command = ["preview", "--table", table, "--model", str(checkpoint), *arguments]
        assert main(command) == status
        told = capsys.readouterr()
        return (told.err if status else told.out).splitlines()

    return run


def test_each_prompt_is_reported(preview):
    lines = preview("--task", "sst2", "--prompt", TEXTS[0], "--prompt", "x")
    assert f"{TEXTS[0]!r}" in lines and "'x'" in lines
    assert "  2 of 4 layers, head plain: retrieved, task sst2" in lines
    assert any(line.startswith("  k 12, budget 0.98, max_distance ") for line in lines)
    nearest = next(line for line in lines if line.startswith("  at "))
    assert nearest.endswith(id_of(TEXTS[0])) and 0 <= float(nearest.split()[1]) < MIN_BOUND


def test_a_probes_exit_is_reported_too(preview):
    lines = preview("--task", "mr", "--budget", "0.9", "--prompt", MANY[0])
    assert any("head probe: retrieved, task mr" in line for line in lines)
    assert "  expected by layer, probe head:" in lines
    assert any("budget 0.9" in line for line in lines)
    bars = [line for line in lines if line.endswith("#")]
    assert len(bars) == 4 and len([bar for bar in bars if bar.startswith("  *")]) == 1
    lines = preview("--task", "mr", "--head", "plain", "--prompt", MANY[0])
    assert "  2 of 4 layers, head plain: retrieved, task mr" in lines


def test_json_is_what_the_server_answers(preview):
    (line,) = preview("--json", "--task", "sst2", "--k", "3", "--prompt", TEXTS[1])
    decided = json.loads(line)
    assert (decided["reason"], decided["choice"]["k"]) == ("retrieved", 3)
    assert decided["neighbours"][0]["id"] == id_of(TEXTS[1])
    assert "labels" not in decided  # no model ran


@pytest.mark.parametrize(("points", "exit_layer"), [("any", 2), ("2", 2), ("3", 3), ("auto", 2)])
def test_exits_are_at_the_points_that_a_server_would_have(preview, points, exit_layer):
    asked = ["--json", "--task", "sst2", "--prompt", TEXTS[0]]
    (line,) = preview(*asked, "--exit-points", points)
    assert json.loads(line)["exit_layer"] == exit_layer


def test_a_prompt_without_a_task_says_so(preview):
    *_, last = preview("--json", "--prompt", f"{TEXTS[0]} It was")
    assert json.loads(last)["reason"] == "unconstrained"
    *_, last = preview("--json", "--chat", "--prompt", "hello")
    assert json.loads(last)["reason"] == "unmatched"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sst9"], "'sst9'; allowed: mr, sst2"),
        (["--k", "0"], "raee.k is 0"),
        (["--head", "fused"], "'fused'; allowed: plain, shortcut, probe"),
        (["--budget", "0"], "raee.budget is 0"),
        (["--exit-points", "four"], "--exit-points is 'four'"),
    ],
)
def test_a_bad_option_is_one_line(preview, arguments, message):
    *_, line = preview("--prompt", "a", *arguments, status=1)
    assert line.startswith("raee-serve preview: error:") and message in line


def load(checkpoint, table, head=None, **given):
    settings = DepthSettings(table, head=head)
    backbone, registry = identify_backbone(checkpoint), CollectorRegistry()
    return load_gate(settings, backbone, checkpoint, ["tiny"], registry=registry, **given)


def test_start_up_tells_table_tasks_look_ups_and_valves(checkpoint, table, capsys):
    access = Access(frozenset({"explain"}))
    gate = load(checkpoint, table, valves=Valves(1, {"sst2": 3}, sample_full=0.1), access=access)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].split()[0] for line in lines] == [
        "exit", "tasks", "look-ups", "valves"
    ]  # fmt: skip
    assert "52 rows" in lines[0]
    assert "mr (probe, budget 0.98), sst2 (plain, budget 0.98)" in lines[1]
    assert "sst2 3" in lines[3] and "0.1" in lines[3] and "explain off, preview on" in lines[3]
    value = gate.metrics._table_rows._metrics
    assert list(value) == [("mr",), ("sst2",)] and gate.table_version >= 1
    gate.close()


def test_a_valve_that_does_not_fit_stops_the_start(checkpoint, table):
    with pytest.raises(RaeeError, match=r"--min-exit-layer is 5; allowed: 1\.\.4"):
        load(checkpoint, table, valves=Valves(5))
    with pytest.raises(RaeeError, match="'trec'; the table's: mr, sst2"):
        load(checkpoint, table, valves=Valves(1, {"trec": 2}))


def test_a_head_that_a_task_does_not_have_stops_the_start(checkpoint, table):
    with pytest.raises(RaeeError, match="--head is probe; allowed for the task 'sst2': plain"):
        load(checkpoint, table, head="probe")


def test_the_kill_switch_needs_no_table(checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("RAEE_OFF", "1")
    gate = load(checkpoint, "/nowhere", valves=Valves(99))
    assert gate.admission.off and gate.lookups is None
    assert capsys.readouterr().out.splitlines() == [
        "raee-serve: RAEE_OFF=1: every request runs vanilla vLLM"
    ]
