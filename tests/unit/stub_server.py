"""A server that answers as vLLM's does, at once and always the same, and counts decisions.

Answers are streams of two tokens; a prompt with `REFUSE` is refused. `python -m` starts it
as a process of its own.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EXIT_LAYER = 2


class StubServer(ThreadingHTTPServer):
    """bodies: (path, body) of every request, in the order they came."""

    request_queue_size = 128

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.bodies: list[tuple[str, dict[str, Any]]] = []


class _Handler(BaseHTTPRequestHandler):
    server: StubServer

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append((self.path, body))
        refused = "REFUSE" in str(body.get("prompt"))
        self.send_response(400 if refused else 200)
        self.end_headers()
        for text in () if refused else (" gre", "at"):
            self._event({"choices": [{"text": text, "delta": {"content": text}}]})
        self._event({"usage": {"completion_tokens": 2, "prompt_tokens": 5}})
        self.wfile.write(b"data: [DONE]\n\n")

    def do_GET(self):
        if self.path not in ("/health", "/metrics"):
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/metrics":
            self.wfile.write(self._metrics().encode())

    def _event(self, fields: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(fields)}\n\n".encode())

    def _metrics(self) -> str:
        decided = sum("raee" in body for _, body in self.server.bodies)
        return (
            f'raee_decisions_total{{reason="retrieved",task="t"}} {decided}\n'
            f'raee_exit_layer_sum{{task="t"}} {decided * EXIT_LAYER}\n'
        )

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    address = parser.parse_args()
    StubServer((address.host, address.port)).serve_forever()
