"""ASGI middleware: admission before the endpoint runs, the decisions in the response headers.

vLLM imports it by name (`--middleware`) and puts it around its whole application, so every route
and flag stays vLLM's own. Decisions are made before the endpoint starts because the headers of a
streamed response leave before anything is generated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from raee_serve.records import ExitDecision
from raee_serve.server.depths import request_depths
from raee_serve.server.gate import Admitted, Gate
from raee_serve.server.options import OptionError, RequestError
from raee_serve.server.prompts import Kind
from raee_serve.server.request_errors import error_response
from raee_serve.server.routes import answer, is_ours

MIDDLEWARE = "raee_serve.server.middleware.RaeeMiddleware"
"""Import path, as vLLM's `--middleware` takes it."""

ROUTES: dict[str, Kind] = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}


class RaeeMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_ours(_path(scope)) and _is_authorized(self.app, scope):
            return await self._answer(scope, receive, send)
        kind = _kind(scope)
        if kind is None or not _is_json(scope) or not _is_authorized(self.app, scope):
            return await self._pass_on(scope, receive, send)
        raw = await _read_body(receive)
        if raw is None:
            return  # the client left before its request was complete
        body = _parsed(raw)
        gate = _gate(scope)
        try:
            admitted = None if body is None else await gate.admit(kind, body)
        except OptionError as error:
            return await error_response(error)(scope, receive, send)
        if admitted is None:  # vLLM has its own answer to what it would not run
            return await self._pass_on(scope, _replay(raw, receive), send)
        await self._run(admitted, scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await answer(_gate(scope), _path(scope), scope)
        except RequestError as error:
            response = error_response(error)
        await response(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        with request_depths(None):
            await self.app(scope, receive, send)

    async def _run(self, admitted: Admitted, scope: Scope, receive: Receive, send: Send) -> None:
        raw = json.dumps(admitted.plan.body).encode()
        with request_depths(admitted.depths):
            await self.app(
                _with_length(scope, len(raw)),
                _replay(raw, receive),
                _with_headers(send, decision_headers(admitted.decisions)),
            )


def _gate(scope: Scope) -> Gate:
    gate: Gate = scope["app"].state.engine_client.gate
    return gate


def decision_headers(decisions: Sequence[ExitDecision]) -> dict[str, str]:
    """Response headers: one value per prompt, in prompt order, "-" where there is none."""

    def joined(values: list[Any]) -> str:
        return ", ".join("-" if value is None else str(value) for value in values)

    distances = [None if d.distance is None else f"{d.distance:.4f}" for d in decisions]
    return {
        "x-raee-exit-layer": joined([d.exit_layer for d in decisions]),
        "x-raee-num-layers": joined([d.num_layers for d in decisions]),
        "x-raee-reason": joined([d.reason.value for d in decisions]),
        "x-raee-task": joined([d.task for d in decisions]),
        "x-raee-distance": joined(distances),
        "x-raee-lookup-ms": joined([f"{d.lookup_ms:.1f}" for d in decisions]),
    }


def _kind(scope: Scope) -> Kind | None:
    return ROUTES.get(_path(scope)) if scope.get("method") == "POST" else None


def _path(scope: Scope) -> str:
    """Of an HTTP request, as routes are named; "" for anything else, and for what CORS asks."""
    if scope["type"] != "http" or scope["method"] == "OPTIONS":
        return ""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_json(scope: Scope) -> bool:
    """As vLLM's own check of the content type, which answers 400 to anything else."""
    content_type = Headers(scope=scope).get("content-type", "")
    return content_type.lower().split(";", maxsplit=1)[0] == "application/json"


def _is_authorized(app: ASGIApp, scope: Scope) -> bool:
    """Whether vLLM's --api-key check, which runs behind this middleware, will let it pass."""
    keys = scope["app"].state.args.api_key or [envs.VLLM_API_KEY]
    tokens = [key for key in keys if key]
    if not tokens:
        return True
    return AuthenticationMiddleware(app, tokens).verify_token(Headers(scope=scope))


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body; None if the client disconnected."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """The body as an object; None if it is no JSON object."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _replay(raw: bytes, receive: Receive) -> Receive:
    """A channel that gives `raw` as the body, and then what else the client sends."""
    pending: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _with_length(scope: Scope, length: int) -> Scope:
    """The scope of a body of `length` bytes."""
    dropped = (b"content-length", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    """Add `headers` to a response unless it reports an error."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return sending
