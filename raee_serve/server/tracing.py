"""A span for each request's decisions, where vLLM's tracing is on (`--otlp-traces-endpoint`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope
from vllm import tracing

from raee_serve.records import ExitDecision

SPAN = "raee.decide"


def record_span(scope: Scope, started_ns: int, decisions: Sequence[ExitDecision]) -> None:
    """From started_ns (since the epoch) until now, a child of the request's `traceparent`."""
    endpoint = getattr(scope["app"].state.args, "otlp_traces_endpoint", None)
    if not endpoint or not tracing.is_tracing_available():
        return
    headers = tracing.extract_trace_headers(Headers(scope=scope))
    tracing.instrument_manual(
        SPAN,
        started_ns,
        time.time_ns(),
        attributes=_attributes(decisions),
        context=tracing.extract_trace_context(headers),
        kind=tracing.SpanKind.INTERNAL,
    )


def _attributes(decisions: Sequence[ExitDecision]) -> dict[str, Any]:
    """One value per prompt; the distance is left out where a prompt was not looked up."""
    attributes: dict[str, Any] = {
        "raee.exit_layer": [d.exit_layer for d in decisions],
        "raee.exit_head": [d.head for d in decisions],
        "raee.num_layers": decisions[0].num_layers,
        "raee.reason": [d.reason.value for d in decisions],
        "raee.task": [d.task or "-" for d in decisions],
        "raee.lookup_ms": [d.lookup_ms for d in decisions],
    }
    distances = [d.distance for d in decisions if d.distance is not None]
    if len(distances) == len(decisions):
        attributes["raee.distance"] = distances
    return attributes
