"""Bodies of HTTP requests: read once, within a limit, and given on."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from raee_serve.server.options import RequestError


def is_json(scope: Scope) -> bool:
    """As vLLM's own check of the content type, which answers 400 to anything else."""
    content_type = Headers(scope=scope).get("content-type", "")
    return content_type.lower().split(";", maxsplit=1)[0] == "application/json"


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes | None:
    """The whole body; None if the client disconnected. Raises RequestError beyond max_bytes."""
    stated = Headers(scope=scope).get("content-length", "")
    _check_size(int(stated) if stated.isdecimal() else 0, max_bytes)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        _check_size(size, max_bytes)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise RequestError(
            None,
            f"the body has more than {max_bytes} bytes (--max-body-bytes)",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        )


def parsed(raw: bytes) -> dict[str, Any] | None:
    """The body as an object; None if it is no JSON object."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def rendered(body: dict[str, Any]) -> bytes:
    """A parsed body as JSON again. Raises RequestError for one nested too deeply to be written."""
    try:
        return json.dumps(body).encode()
    except RecursionError:
        raise RequestError(None, "the body is nested too deeply") from None


def replay(raw: bytes, receive: Receive) -> Receive:
    """A channel that gives `raw` as the body, and then what else the client sends."""
    pending: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def with_length(scope: Scope, length: int) -> Scope:
    """The scope of a body of `length` bytes."""
    dropped = (b"content-length", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}
