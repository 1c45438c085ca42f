"""ASGI middleware: admission before the endpoint runs, the decisions in the response headers.

vLLM imports it by name (`--middleware`) and puts it around its whole application, so every route
and flag stays vLLM's own. Decisions are made before the endpoint starts because the headers of a
streamed response leave before anything is generated.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from raee_serve.records import ExitDecision
from raee_serve.server.depths import RequestDepths, request_depths
from raee_serve.server.engine_client import DepthClient
from raee_serve.server.explain import raee_object, with_raee
from raee_serve.server.gate import Admitted, Gate
from raee_serve.server.options import RequestError
from raee_serve.server.page import is_page, page_file
from raee_serve.server.prompts import Kind
from raee_serve.server.readiness import asks_whether_ready, readiness
from raee_serve.server.request_body import (
    is_json,
    parsed,
    read_body,
    rendered,
    replay,
    with_length,
)
from raee_serve.server.request_errors import error_response
from raee_serve.server.routes import answered, is_ours
from raee_serve.server.tracing import record_span

MIDDLEWARE = "raee_serve.server.middleware.RaeeMiddleware"
"""Import path, as vLLM's `--middleware` takes it."""

MAX_IN_HEADERS = 128
"""Prompts of a list whose decisions are told in headers: 6 kB. Clients and proxies take 8."""

Handler = Callable[[str, Scope, Receive, Send], Awaitable[None]]

ROUTES: dict[str, Kind] = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}


class RaeeMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _path(scope)
        if asks_whether_ready(path, scope):
            response = await readiness(scope["app"].state.engine_client)
            return await response(scope, receive, send)
        handle = self._handler(path)
        if handle is None or not (is_page(path) or _is_authorized(self.app, scope)):
            return await self._pass_on(scope, receive, send)
        try:
            await handle(path, scope, receive, send)
        except RequestError as error:
            await _across_origins(error_response(error), scope)(scope, receive, send)

    def _handler(self, path: str) -> Handler | None:
        """None for what is vLLM's alone."""
        if is_page(path):
            return self._page
        if is_ours(path):
            return self._answer
        return self._admit if path in ROUTES else None

    async def _page(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        response = page_file(_gate(scope).access, path, scope["method"])
        await response(scope, receive, send)

    async def _answer(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        client: DepthClient = scope["app"].state.engine_client
        response = await answered(client, path, scope, receive)
        await _across_origins(response, scope)(scope, receive, send)

    async def _admit(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or not is_json(scope):
            return await self._pass_on(scope, receive, send)
        gate = _gate(scope)
        with gate.in_use():
            raw = await read_body(scope, receive, gate.access.max_body_bytes)
            if raw is None:
                return  # the client left before its request was complete
            admitted = await _admitted(gate, ROUTES[path], scope, raw)
            if admitted is None:  # vLLM has its own answer to what it would not run
                return await self._pass_on(scope, replay(raw, receive), send)
            raw = rendered(admitted.plan.body)
            scope, receive = with_length(scope, len(raw)), replay(raw, receive)
            await self._run(gate, admitted, scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        with request_depths(None):
            await self.app(scope, receive, send)

    async def _run(
        self, gate: Gate, admitted: Admitted, scope: Scope, receive: Receive, send: Send
    ) -> None:
        depths = RequestDepths(admitted.depths(wants_labels=admitted.explain))

        def begin(response: Message) -> None:
            MutableHeaders(scope=response).update(decision_headers(admitted.decisions))
            gate.metrics.record(admitted.decisions)

        send = _on_success(send, begin)
        if admitted.explain:
            about = (admitted.decisions, gate.table_version, depths.restarted, depths.labels)
            send = with_raee(send, lambda: raee_object(*about))
        with request_depths(depths):
            await self.app(scope, receive, send)
        if gate.sampler is not None:
            gate.sampler.submit(depths.reruns)


def _gate(scope: Scope) -> Gate:
    gate: Gate = scope["app"].state.engine_client.gate
    return gate


async def _admitted(gate: Gate, kind: Kind, scope: Scope, raw: bytes) -> Admitted | None:
    """The body's decisions, traced; None if vLLM would not run it. Raises RequestError."""
    body, started_ns = parsed(raw), time.time_ns()
    admitted = None if body is None else await gate.admit(kind, body)
    if admitted is not None:
        record_span(scope, started_ns, admitted.decisions)
    return admitted


def decision_headers(decisions: Sequence[ExitDecision]) -> dict[str, str]:
    """Response headers: one value per prompt, in prompt order, "-" where there is none.

    Of a longer list than `MAX_IN_HEADERS` the first so many; `explain` says all.
    """
    decisions = decisions[:MAX_IN_HEADERS]

    def joined(values: list[Any]) -> str:
        return ", ".join("-" if value is None else str(value) for value in values)

    distances = [None if d.distance is None else f"{d.distance:.4f}" for d in decisions]
    decided = [d.decided_layer for d in decisions]
    otherwise = {"x-raee-decided-layer": joined(decided)} if any(decided) else {}
    return {
        "x-raee-exit-layer": joined([d.exit_layer for d in decisions]),
        "x-raee-exit-head": joined([d.head for d in decisions]),
        "x-raee-num-layers": joined([d.num_layers for d in decisions]),
        "x-raee-reason": joined([d.reason.value for d in decisions]),
        "x-raee-task": joined([d.task for d in decisions]),
        "x-raee-distance": joined(distances),
        "x-raee-lookup-ms": joined([f"{d.lookup_ms:.1f}" for d in decisions]),
        **otherwise,
    }


def _path(scope: Scope) -> str:
    """Of an HTTP request, as routes are named; "" for anything else, and for what CORS asks."""
    if scope["type"] != "http" or scope["method"] == "OPTIONS":
        return ""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


def _across_origins(response: ASGIApp, scope: Scope) -> ASGIApp:
    """An answer of ours, which does not pass vLLM's own CORS check on its way."""
    args = scope["app"].state.args
    return CORSMiddleware(
        response,
        allow_origins=args.allowed_origins,
        allow_credentials=args.allow_credentials,
        allow_methods=args.allowed_methods,
        allow_headers=args.allowed_headers,
    )


def _is_authorized(app: ASGIApp, scope: Scope) -> bool:
    """Whether vLLM's --api-key check, which runs behind this middleware, will let it pass."""
    keys = scope["app"].state.args.api_key or [envs.VLLM_API_KEY]
    tokens = [key for key in keys if key]
    if not tokens:
        return True
    return AuthenticationMiddleware(app, tokens).verify_token(Headers(scope=scope))


def _on_success(send: Send, begin: Callable[[Message], None]) -> Send:
    """Hand the start of a response to `begin`, unless it reports an error."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            begin(message)
        await send(message)

    return sending
