"""Counters of decisions, in the registry that vLLM's own `/metrics` exposes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.cost import LookupCost

LOOKUP_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
STAGE_BUCKETS_S = (0.0005, 0.001, 0.002, *LOOKUP_BUCKETS_S)
AGREEMENT_BUCKETS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.999, 1.0)


class DecisionMetrics:
    """Everything that starts with `raee_`; docs/operations.md lists the metrics."""

    def __init__(self, num_layers: int, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"raee_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(
                f"raee_{name}", text, labels, buckets=tuple(buckets), registry=registry
            )

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(
                f"raee_{name}", text, labels, registry=registry, multiprocess_mode="mostrecent"
            )

        layers = range(1, num_layers + 1)
        self._decisions = counter(
            "decisions", "Prompts by the reason for their exit layer.", "reason", "task"
        )
        self._exit_layer = histogram("exit_layer", "Exit layers of prompts.", layers, "task")
        self._exit_head = counter("exit_heads", "Prompts by their exit head.", "head", "task")
        self._shadow_exit_layer = histogram(
            "shadow_exit_layer", "Exit layers decided and, under --shadow, not run.", layers, "task"
        )
        self._layers_saved = counter(
            "layers_saved", "Layers that prompts did not run, one count a prompt.", "task"
        )
        self._point_layers = counter(
            "exit_point_layers",
            "Layers that prompts ran beyond the exit decided for them, up to an exit point.",
            "task",
        )
        self._lookup = histogram(
            "lookup_seconds", "Time that a prompt waited for its look-up.", LOOKUP_BUCKETS_S
        )
        self._stage = histogram(
            "lookup_stage_seconds",
            "Time of a look-up's stages: wait for each prompt, the others for each batch.",
            STAGE_BUCKETS_S,
            "stage",
        )
        self._cache = counter("cache", "Texts embedded anew (miss) or remembered (hit).", "result")
        self._reruns = counter("reruns", "Prompts drawn by --sample-full.", "outcome")
        self._agreement = histogram(
            "agreement",
            "Share of the answer before the first difference between the two depths.",
            AGREEMENT_BUCKETS,
            "task",
        )
        self._restarts = counter(
            "guard_restarts",
            "Early answers that looped and were begun again at full depth.",
            "task",
        )
        self._table = gauge("table_info", "The exit table that is loaded.", "version")
        self._table_rows = gauge("table_rows", "Rows of the loaded exit table.", "task")
        gauge("num_layers", "Layers of the backbone.").set(num_layers)
        self._reloads = counter(
            "table_reloads",
            "Attempts to load the table anew: loaded, or kept as it was.",
            "outcome",
        )

    def reloaded(self, outcome: str) -> None:
        """outcome: loaded or kept."""
        self._reloads.labels(outcome).inc()

    def record(self, decisions: Iterable[ExitDecision]) -> None:
        """Those of a request that vLLM runs."""
        for decision in decisions:
            task = decision.task or "-"
            self._decisions.labels(decision.reason.value, task).inc()
            self._exit_layer.labels(task).observe(decision.exit_layer)
            self._exit_head.labels(decision.head, task).inc()
            self._layers_saved.labels(task).inc(decision.num_layers - decision.exit_layer)
            if decision.decided_layer is not None:
                if decision.reason is Reason.SHADOW:
                    self._shadow_exit_layer.labels(task).observe(decision.decided_layer)
                else:
                    extra = decision.exit_layer - decision.decided_layer
                    self._point_layers.labels(task).inc(extra)
            if decision.lookup_ms:
                self._lookup.observe(decision.lookup_ms / 1000)

    def waited(self, seconds: float) -> None:
        """How long a look-up waited for its batch."""
        self._stage.labels("wait").observe(seconds)

    def looked_up(self, cost: LookupCost) -> None:
        """What a batch of look-ups cost."""
        for stage, seconds in cost.seconds.items():
            self._stage.labels(stage).observe(seconds)
        self._cache.labels("hit").inc(cost.cache_hits)
        self._cache.labels("miss").inc(cost.cache_misses)

    def rerun(self, outcome: str) -> None:
        """One more prompt drawn; outcome: compared, busy, failed or not-greedy."""
        self._reruns.labels(outcome).inc()

    def agreement(self, task: str, share: float) -> None:
        """Of a compared prompt, within 0..1."""
        self._agreement.labels(task).observe(share)

    def restarted(self, task: str) -> None:
        """One more prompt whose early answer looped."""
        self._restarts.labels(task).inc()

    def table(self, version: int, rows: Mapping[str, int]) -> None:
        """The table loaded now, and its rows by task; what was said of another is forgotten."""
        self._table.clear()
        self._table_rows.clear()
        self._table.labels(str(version)).set(1)
        for task, count in rows.items():
            self._table_rows.labels(task).set(count)
