"""What is counted, and that the Grafana dashboard asks only for what there is."""

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.cost import LookupCost
from raee_serve.server.metrics import DecisionMetrics
from tests.unit.serving import ALLOWED, Server

pytestmark = pytest.mark.unit

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana" / "raee-serve.json").read_text())
SUFFIXES = ("_bucket", "_sum", "_count", "_total")


def test_decisions_are_counted():
    server = Server()
    server.post(prompt=["a It was", "b"], **ALLOWED)
    assert server.value("raee_decisions_total", reason="retrieved", task="sst2") == 1
    assert server.value("raee_decisions_total", reason="unmatched", task="-") == 1
    assert server.value("raee_exit_layer_bucket", le="5.0", task="sst2") == 1
    assert server.value("raee_exit_layer_bucket", le="5.0", task="-") == 0
    assert server.value("raee_exit_layer_count", task="-") == 1
    assert server.value("raee_layers_saved_total", task="sst2") == 25
    assert server.value("raee_layers_saved_total", task="-") == 0
    assert server.value("raee_lookup_seconds_count") == 1
    assert server.value("raee_num_layers") == 30


def test_stages_and_the_cache_are_counted():
    server, cost = Server(), LookupCost()
    cost.seconds |= {"encode": 0.02, "search": 0.004}
    cost.cache_hits, cost.cache_misses = 3, 1
    server.metrics.looked_up(cost)
    server.metrics.waited(0.5)
    assert server.value("raee_lookup_stage_seconds_sum", stage="encode") == 0.02
    assert server.value("raee_lookup_stage_seconds_sum", stage="wait") == 0.5
    assert server.value("raee_cache_total", result="hit") == 3
    assert server.value("raee_cache_total", result="miss") == 1


def test_only_the_table_that_is_loaded_is_told():
    server = Server()
    server.metrics.table(3, {"sst2": 40, "trec": 5})
    server.metrics.table(4, {"sst2": 50})
    assert server.value("raee_table_info", version="3") is None
    assert server.value("raee_table_info", version="4") == 1
    assert server.value("raee_table_rows", task="sst2") == 50
    assert server.value("raee_table_rows", task="trec") is None


def test_a_shadowed_decision_saves_nothing():
    registry = CollectorRegistry()
    full = ExitDecision.full(30, Reason.SHADOW, task="sst2")
    DecisionMetrics(30, registry).record([replace(full, decided_layer=4)])
    assert registry.get_sample_value("raee_layers_saved_total", {"task": "sst2"}) == 0
    assert registry.get_sample_value("raee_shadow_exit_layer_sum", {"task": "sst2"}) == 4


def test_layers_up_to_an_exit_point_are_counted():
    registry = CollectorRegistry()
    at_point = ExitDecision(8, 30, Reason.RETRIEVED, task="sst2", decided_layer=5)
    DecisionMetrics(30, registry).record([at_point])
    assert registry.get_sample_value("raee_exit_point_layers_total", {"task": "sst2"}) == 3
    assert registry.get_sample_value("raee_layers_saved_total", {"task": "sst2"}) == 22
    assert registry.get_sample_value("raee_shadow_exit_layer_sum", {"task": "sst2"}) is None


def metrics_in(text):
    """Names of metrics, without the suffixes that Prometheus gives to their samples."""
    names = set(re.findall(r"\b(?:raee_|vllm:)\w+", text))
    return {next((n.removesuffix(s) for s in SUFFIXES if n.endswith(s)), n) for n in names}


def our_metrics():
    registry = CollectorRegistry()
    DecisionMetrics(30, registry)
    return {family.name for family in registry.collect()}


def test_the_dashboard_asks_for_metrics_that_exist():
    panels = DASHBOARD["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    asked = metrics_in(" ".join(queries))
    ours = {name for name in asked if name.startswith("raee_")}
    assert ours and ours <= our_metrics()
    vllm = Path(find_spec("vllm").origin).parent / "v1" / "metrics" / "loggers.py"
    assert asked - ours <= metrics_in(vllm.read_text())


def test_the_dashboard_is_one_that_grafana_can_import():
    assert DASHBOARD["title"] and DASHBOARD["uid"] and DASHBOARD["schemaVersion"] >= 36
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"] and set(panel["gridPos"]) == {"h", "w", "x", "y"}
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert all(target["refId"] for target in panel["targets"])


def test_every_metric_is_in_the_docs_and_on_the_dashboard():
    written = metrics_in((DOCS / "operations.md").read_text())
    drawn = metrics_in(json.dumps(DASHBOARD))
    assert our_metrics() <= written
    assert our_metrics() <= drawn
