"""A span for the decisions, where vLLM's tracing is on."""

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm import tracing

from tests.unit.serving import ALLOWED, Server

pytestmark = pytest.mark.unit

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch):
    """Of the spans that end meanwhile."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter.get_finished_spans


def traced_server():
    server = Server()
    server.app.state.args.otlp_traces_endpoint = "http://nowhere:4317"
    return server


def test_the_decisions_are_a_child_of_the_incoming_span(spans):
    traced_server().post(
        prompt=["a It was", "b It was"], headers={"traceparent": PARENT}, **ALLOWED
    )
    (span,) = spans()
    assert span.name == "raee.decide" and span.end_time >= span.start_time
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    assert span.attributes["raee.exit_layer"] == (5, 5)
    assert span.attributes["raee.reason"] == ("retrieved", "retrieved")
    assert span.attributes["raee.task"] == ("sst2", "sst2")
    assert span.attributes["raee.distance"] == (0.25, 0.25)


def test_without_a_parent_it_is_a_trace_of_its_own(spans):
    traced_server().post(prompt=["a It was", "b"], **ALLOWED)
    (span,) = spans()
    assert span.parent is None
    assert "raee.distance" not in span.attributes


def test_nothing_is_traced_unless_vllm_traces(spans):
    Server().post(prompt="a It was", headers={"traceparent": PARENT}, **ALLOWED)
    assert not spans()


def test_without_the_packages_requests_are_served_all_the_same(spans, monkeypatch):
    monkeypatch.setattr(tracing, "is_tracing_available", lambda: False)
    assert traced_server().post(prompt="a It was", **ALLOWED).status_code == 200
    assert not spans()
