"""Our own routes, under /v1/raee/: the middleware hands them here, behind vLLM's API-key check."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from raee_serve.server.gate import Gate
from raee_serve.server.options import RequestError
from raee_serve.server.reload import ReloadError, Snapshot

PREFIX = "/v1/raee/"

Handler = Callable[[Gate], Awaitable[dict[str, Any]]]
"""-> body of the answer to a POST. Raises RequestError."""


def is_ours(path: str) -> bool:
    return path.startswith(PREFIX)


async def answer(gate: Gate, path: str, scope: Scope) -> Response:
    """Of the route at `path`. Raises RequestError for a request that it does not take."""
    handler = HANDLERS.get(path.removeprefix(PREFIX))
    if handler is None:
        raise RequestError(None, f"there is no such route under {PREFIX}", HTTPStatus.NOT_FOUND)
    if scope["method"] != "POST":
        raise RequestError(None, "allowed: POST", HTTPStatus.METHOD_NOT_ALLOWED)
    return JSONResponse(await handler(gate))


async def reload(gate: Gate) -> dict[str, Any]:
    """Take up the exit table as it is now; what was loaded before, and what is loaded."""
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


HANDLERS: dict[str, Handler] = {"reload": reload}
"""By the last part of the path."""
