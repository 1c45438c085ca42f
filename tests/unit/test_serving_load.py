"""What `vllm bench serve`'s load generator is made to send, and what is read from it."""

import json
import math
import sys
import threading

import pytest
from transformers import AutoTokenizer

from benchmarks import serving
from benchmarks.serving_load import Generator, Load
from benchmarks.serving_report import Run
from benchmarks.serving_shapes import Asked, Shape
from benchmarks.serving_systems import Decided, started
from raee_serve.tasks.registry import get_task
from tests.tiny import tokenized_llama
from tests.unit.stub_server import EXIT_LAYER, StubServer

pytestmark = pytest.mark.unit

LABELS = Shape("classification", (get_task("demo_sentiment"),), 1, 3)
NOTES = Shape("summarisation", (get_task("demo_summary"),), 2, 3)
AT_ONCE = Load(math.inf, 2, 0)


@pytest.fixture
def stub():
    server = StubServer(("127.0.0.1", 0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def generate(stub, smollm2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    def run(shape, texts, *, names_tasks, load=AT_ONCE):
        asked = [Asked(shape.tasks[0], text, 0) for text in texts]
        with (tmp_path / "load.log").open("w") as log:
            url = f"http://127.0.0.1:{stub.server_port}"
            return Generator("m", tokenizer, log).run(url, shape, asked, load, names_tasks)

    run.tokenizer = tokenizer
    return run


def test_requests_name_their_task_and_nothing_else(generate, stub, capsys):
    result = generate(LABELS, ["fine", "dull", "grand"], names_tasks=True)
    assert capsys.readouterr().out == ""
    assert result["generated_texts"] == [" great"] * 3
    paths, bodies = zip(*stub.bodies, strict=True)
    assert set(paths) == {"/v1/completions"}
    assert {body["prompt"] for body in bodies} == {f"{t} It was" for t in ("fine", "dull", "grand")}
    for body in bodies:
        assert body["raee"] == {"task": "demo_sentiment"} and "allowed_token_ids" not in body
        assert body["max_tokens"] == 1 and body["temperature"] == 0 and body["stream"]
    run = Run.of((LABELS.name, 1, "saturation", "raee-serve"), math.inf, result, Decided())
    assert run.requests == 3 and run.rps > 0 and run.p99_e2el_ms >= run.p50_ttft_ms > 0


def test_vanilla_is_limited_to_the_first_tokens_of_the_labels(generate, stub):
    generate(LABELS, ["fine"], names_tasks=False)
    [(_, body)] = stub.bodies
    allowed = LABELS.tasks[0].plain_token_ids(generate.tokenizer)
    assert "raee" not in body and body["allowed_token_ids"] == list(allowed)


def test_a_list_is_one_request(generate, stub):
    texts = [f"text {n}" for n in range(6)]
    result = generate(LABELS, texts, names_tasks=True, load=Load(math.inf, 1, 0, list_of=3))
    assert result["completed"] == 2
    prompts = [body["prompt"] for _, body in stub.bodies]
    assert [prompt for own in prompts for prompt in own] == [f"{text} It was" for text in texts]


def test_chats_go_to_the_chat_route(generate, stub):
    generate(NOTES, ["A note."], names_tasks=True)
    [(path, body)] = stub.bodies
    assert path == "/v1/chat/completions"
    assert body["messages"] == NOTES.tasks[0].render("A note.")
    assert body["max_completion_tokens"] == 2 and body["ignore_eos"]
    assert "allowed_token_ids" not in body


def test_a_failed_request_is_no_measurement(generate):
    with pytest.raises(RuntimeError, match="1 of 2 requests failed: Bad Request"):
        generate(LABELS, ["fine", "REFUSE"], names_tasks=True)


def test_the_whole_benchmark_on_servers_that_do_nothing(monkeypatch, smollm2, tmp_path, capsys):
    model = tokenized_llama(tmp_path / "tiny", smollm2)

    def stub_system(name="raee-serve"):
        command = [sys.executable, "-m", "tests.unit.stub_server"]
        return started(name, command, {}, tmp_path / "stub.log")

    monkeypatch.setattr(serving, "vanilla_server", lambda name, *_: stub_system(name))
    monkeypatch.setattr(serving, "raee_server", lambda *_: stub_system())
    monkeypatch.setattr(serving, "check_table", lambda args: None)
    flags = ["--model", str(model), "--table", "t", "--out", str(tmp_path / "out"), "--rounds", "2"]
    flags += ["--tasks", "demo_sentiment", "--rows", "10", "--rates", "0.5", "--seconds", "0.1"]
    flags += ["--summary-tasks", "demo_summary", "--summary-rows", "8", "--max-num-seqs", "8"]
    monkeypatch.setattr(sys, "argv", ["serving", *flags])
    serving.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["serve_flags"] == ["--max-num-seqs", "8"] and said["saturation_rps_ratio"] > 0
    for shape, rows in (("classification", 20), ("summarisation", 16)):
        found = said["shapes"][shape]
        assert found["mean_exit_layer"] == found["cut_layers"] == EXIT_LAYER < found["num_layers"]
        assert found["reasons"] == {"retrieved": rows}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"serving-classification.png", "serving-summarisation.png"}
    assert files == {"serving.json", "serving.csv", *pictures}
    assert said["lists_ratio"] > 0 and said["over_cut_checkpoint"] > 0
    runs = 2 * 3 * (2 + 1 + 2)  # rounds, systems, loads: of labels lists too
    assert len((tmp_path / "out" / "serving.csv").read_text().splitlines()) == 1 + runs
