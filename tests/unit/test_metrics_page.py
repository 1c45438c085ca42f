"""What is read off a page of metrics."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from benchmarks.metrics_page import page, total

pytestmark = pytest.mark.unit


@pytest.fixture
def url():
    registry = CollectorRegistry()
    asked = Counter("asked", "Requests.", ["how", "who"], registry=registry)
    for how, who, count in (("a", "x", 1), ("a", "y", 2), ("b", "x", 4)):
        asked.labels(how, who).inc(count)
    Counter("asked_again", "More.", registry=registry).inc(100)
    Gauge("vllm:running", "Now.", registry=registry).set(0.5)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_samples_are_added_up_whatever_they_are_labelled_beside(url):
    assert total(url, "asked_total") == 7
    assert total(url, "asked_total", how="a") == 3
    assert total(url, "asked_total", how="a", who="y") == 2
    assert total(url, "vllm:running") == 0.5
    assert 'asked_total{how="b",who="x"} 4.0' in page(url)


def test_what_is_not_there_is_0(url):
    assert total(url, "asked") == total(url, "asked_total", how="c") == 0
    assert total(url, "asked_total", to="x") == 0
