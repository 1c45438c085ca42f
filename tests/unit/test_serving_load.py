"""What `vllm bench serve`'s load generator is made to send, and what is read from it."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from transformers import AutoTokenizer

from benchmarks.serving_load import Generator, Load
from benchmarks.serving_report import Run
from benchmarks.serving_shapes import Asked, Shape
from benchmarks.serving_systems import Decided
from raee_serve.table.tasks import get_task

pytestmark = pytest.mark.unit

LABELS = Shape("classification", (get_task("demo_sentiment"),), 1, 3)
NOTES = Shape("summarisation", (get_task("demo_summary"),), 2, 3)
AT_ONCE = Load(math.inf, 2, 0)


class Stub(BaseHTTPRequestHandler):
    """Streams two tokens to everybody; refuses a prompt with the word `refuse`."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append((self.path, body))
        refused = "refuse" in str(body.get("prompt"))
        self.send_response(400 if refused else 200)
        self.end_headers()
        for text in () if refused else (" gre", "at"):
            choice = {"text": text, "delta": {"content": text}}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        usage = {"completion_tokens": 2, "prompt_tokens": 5}
        self.wfile.write(f"data: {json.dumps({'usage': usage})}\n\ndata: [DONE]\n\n".encode())

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.bodies = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def generate(stub, smollm2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    def run(shape, texts, *, names_tasks):
        asked = [Asked(shape.tasks[0], text, 0) for text in texts]
        with (tmp_path / "load.log").open("w") as log:
            url = f"http://127.0.0.1:{stub.server_port}"
            return Generator("m", tokenizer, log).run(url, shape, asked, AT_ONCE, names_tasks)

    run.tokenizer = tokenizer
    return run


def test_requests_name_their_task_and_are_limited_to_its_words(generate, stub, capsys):
    result = generate(LABELS, ["fine", "dull", "grand"], names_tasks=True)
    assert capsys.readouterr().out == ""
    assert result["generated_texts"] == [" great"] * 3
    paths, bodies = zip(*stub.bodies, strict=True)
    assert set(paths) == {"/v1/completions"}
    assert {body["prompt"] for body in bodies} == {f"{t} It was" for t in ("fine", "dull", "grand")}
    allowed = list(LABELS.tasks[0].label_token_ids(generate.tokenizer))
    for body in bodies:
        assert body["raee"] == {"task": "demo_sentiment"} and body["allowed_token_ids"] == allowed
        assert body["max_tokens"] == 1 and body["temperature"] == 0 and body["stream"]
    run = Run.of((LABELS.name, 1, "saturation", "raee-serve"), math.inf, result, Decided())
    assert run.requests == 3 and run.rps > 0 and run.p99_e2el_ms >= run.p50_ttft_ms > 0


def test_vanilla_hears_nothing_of_tasks(generate, stub):
    generate(LABELS, ["fine"], names_tasks=False)
    [(_, body)] = stub.bodies
    assert "raee" not in body and "allowed_token_ids" in body


def test_chats_go_to_the_chat_route(generate, stub):
    generate(NOTES, ["A note."], names_tasks=True)
    [(path, body)] = stub.bodies
    assert path == "/v1/chat/completions"
    assert body["messages"] == NOTES.tasks[0].render("A note.")
    assert body["max_completion_tokens"] == 2 and body["ignore_eos"]
    assert "allowed_token_ids" not in body


def test_a_failed_request_is_no_measurement(generate):
    with pytest.raises(RuntimeError, match="1 of 2 requests failed: Bad Request"):
        generate(LABELS, ["fine", "refuse"], names_tasks=True)
