"""Counters of decisions, in the registry that vLLM's own `/metrics` exposes."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from raee_serve.records import ExitDecision

LOOKUP_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class DecisionMetrics:
    """`raee_decisions_total{reason,task}`, `raee_exit_layer`, `raee_lookup_seconds` and
    `raee_table_reloads_total{outcome}`."""

    def __init__(self, num_layers: int, registry: CollectorRegistry = REGISTRY) -> None:
        self._decisions = Counter(
            "raee_decisions",
            "Prompts by the reason for their exit layer.",
            ("reason", "task"),
            registry=registry,
        )
        self._exit_layer = Histogram(
            "raee_exit_layer",
            "Exit layers of prompts.",
            buckets=tuple(range(1, num_layers + 1)),
            registry=registry,
        )
        self._lookup = Histogram(
            "raee_lookup_seconds",
            "Time that a prompt waited for its look-up.",
            buckets=LOOKUP_BUCKETS_S,
            registry=registry,
        )

        self._reloads = Counter(
            "raee_table_reloads",
            "Attempts to take up a new version of the exit table (loaded, or the old one kept).",
            ("outcome",),
            registry=registry,
        )

    def reloaded(self, outcome: str) -> None:
        """outcome: loaded or kept."""
        self._reloads.labels(outcome).inc()

    def record(self, decisions: Iterable[ExitDecision]) -> None:
        for decision in decisions:
            self._decisions.labels(decision.reason.value, decision.task or "-").inc()
            self._exit_layer.observe(decision.exit_layer)
            if decision.lookup_ms:
                self._lookup.observe(decision.lookup_ms / 1000)
