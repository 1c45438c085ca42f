"""GET /ready: whether this server is one to send requests to.

Its twin is vLLM's /health, which says whether the engine lives. They differ while the server drains
after SIGTERM: it is alive until its last request is answered, and takes no new one. Both are open
without an API key, for probes have none, and tell nothing but a status code.
"""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Scope
from vllm.v1.engine.exceptions import EngineDeadError

from raee_serve.server.engine_client import DepthClient

READY = "/ready"


def asks_whether_ready(path: str, scope: Scope) -> bool:
    return path == READY and scope["method"] in ("GET", "HEAD")


async def readiness(client: DepthClient) -> Response:
    """200, or 503 while the server shuts down or when its engine is dead.

    Table and encoder need no look: without them the server would not listen.
    """
    return Response(status_code=200 if await _is_ready(client) else 503)


async def _is_ready(client: DepthClient) -> bool:
    if client.is_stopping:
        return False
    try:
        await client.check_health()
    except EngineDeadError:
        return False
    return True
