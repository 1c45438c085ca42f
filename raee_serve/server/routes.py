"""Our own routes, under /v1/raee/: the middleware hands them here, behind vLLM's API-key check.

To add one, name its handler in HANDLERS; `--disable-NAME` comes with an entry in access.SWITCHES.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError

from raee_serve.server.classify import classify
from raee_serve.server.engine_client import DepthClient
from raee_serve.server.explain import raee_object
from raee_serve.server.gate import Gate
from raee_serve.server.options import MethodError, RequestError, shown
from raee_serve.server.reload import ReloadError, Snapshot
from raee_serve.server.request_body import is_json, parsed, read_body
from raee_serve.tasks.prompts import ChatPrompt
from raee_serve.tasks.task import Task

PREFIX = "/v1/raee/"

Handler = Callable[[DepthClient, dict[str, Any]], Awaitable[dict[str, Any]]]
"""(engine client, body of a POST) -> body of the answer. Raises RequestError, and VLLMError."""


def is_ours(path: str) -> bool:
    return path.startswith(PREFIX)


async def answered(client: DepthClient, path: str, scope: Scope, receive: Receive) -> Response:
    """Of the route at `path`. Raises RequestError for a request that it does not take."""
    gate, name = client.gate, path.removeprefix(PREFIX)
    if name not in HANDLERS or not gate.access.allows(name):
        raise RequestError(None, f"there is no {shown(path)} here", HTTPStatus.NOT_FOUND)
    if scope["method"] != (method := "GET" if name in READS else "POST"):
        raise MethodError(method)
    body = {} if name in READS | WITHOUT_BODY else await _body(gate, scope, receive)
    if body is None:
        return Response()  # to nobody: the client is gone
    try:
        answer = await HANDLERS[name](client, body)
    except VLLMError as error:  # of the engine: its own answer to what it would not run
        told = create_error_response(error)
        return JSONResponse(told.model_dump(), status_code=told.error.code)
    return JSONResponse(answer)


async def _body(gate: Gate, scope: Scope, receive: Receive) -> dict[str, Any] | None:
    """None if the client is gone."""
    if not is_json(scope):
        raise RequestError(None, "the content type is to be application/json")
    raw = await read_body(scope, receive, gate.access.max_body_bytes)
    if raw is None:
        return None
    body = parsed(raw)
    if body is None:
        raise RequestError(None, "the body is no JSON object")
    return body


async def preview(client: DepthClient, body: dict[str, Any]) -> dict[str, Any]:
    """What would be decided for the body of a completions or chat request, and why."""
    gate = client.gate
    field = "messages" if "messages" in body else "prompt"
    if "messages" in body and "prompt" in body:
        raise RequestError("prompt", "give prompt, as for completions, or messages, as for chat")
    admitted = await gate.preview("chat" if field == "messages" else "completions", body)
    if admitted is None:
        raise RequestError(field, f"{field} is {shown(body.get(field))}; allowed: as vLLM takes it")
    return raee_object(admitted.decisions, gate.table_version)


async def reload(client: DepthClient, _: dict[str, Any]) -> dict[str, Any]:
    """Take up the exit table as it is now; what was loaded before, and what is loaded."""
    gate = client.gate
    if gate.reloader is None:
        raise RequestError(None, "this server was started without an exit table (--table)")
    try:
        old, new = await gate.reloader.reload()
    except ReloadError as error:
        raise RequestError(None, str(error), HTTPStatus.CONFLICT) from error
    return {"object": "raee.reload", "old": _described(old), "new": _described(new)}


def _described(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "version": snapshot.version,
        "rows": sum(snapshot.rows.values()),
        "tasks": dict(snapshot.rows),
    }


async def tasks(client: DepthClient, _: dict[str, Any]) -> dict[str, Any]:
    """The tasks of the loaded table."""
    gate = client.gate
    return {"object": "list", "data": [_of_task(gate, task) for task in _tasks(gate)]}


async def page(client: DepthClient, _: dict[str, Any]) -> dict[str, Any]:
    """What the page at /raee has to know of this server: its tasks, and what it offers."""
    gate = client.gate
    return {
        "object": "raee.page",
        "num_layers": gate.admission.num_layers,
        "has_chat_template": gate.has_chat_template,
        "explain": gate.access.allows("explain"),
        "preview": gate.access.allows("preview"),
        "tasks": [_of_task(gate, task) for task in _tasks(gate)],
    }


def _tasks(gate: Gate) -> Iterable[Task]:
    return gate.admission.tasks.values()


def _of_task(gate: Gate, task: Task) -> dict[str, Any]:
    """head: of a label task, the one that answers unless a request asks for another."""
    heads = gate.admission.heads_of(task.name) if task.kind == "labels" else ()
    return {
        "name": task.name,
        "kind": task.kind,
        "labels": list(task.labels),
        "head": next(iter(heads), None),
        "rows": 0 if gate.snapshot is None else gate.snapshot.rows.get(task.name, 0),
        "endpoint": "chat" if isinstance(task.prompt, ChatPrompt) else "completions",
        "template": task.prompt.template,
    }


HANDLERS: dict[str, Handler] = {
    "classify": classify,
    "preview": preview,
    "reload": reload,
    "tasks": tasks,
    "page": page,
}
"""By the last part of the path."""
READS = frozenset({"page", "tasks"})
"""Routes that take a GET, the others a POST."""
WITHOUT_BODY = frozenset({"reload"})
"""Routes that take a POST as it is, and read no body."""
