"""The gate every request passes: plan, look up, count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.retriever import Lookup
from raee_serve.server.admission import Admission, Plan
from raee_serve.server.depths import PromptDepth
from raee_serve.server.lookup import LookupBatcher
from raee_serve.server.metrics import DecisionMetrics
from raee_serve.server.prompts import Kind, RawPrompt, TextPrompt, TokenIds, read_prompts
from raee_serve.server.reload import Snapshot, TableReloader

Detokenize = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Admitted:
    """decisions: one per prompt, in prompt order. plan: what they were made from."""

    decisions: tuple[ExitDecision, ...]
    plan: Plan

    @property
    def depths(self) -> list[PromptDepth]:
        """How each prompt is to run, in prompt order."""
        return [self._depth(decision) for decision in self.decisions]

    def _depth(self, decision: ExitDecision) -> PromptDepth:
        words = self.plan.label_tokens.get(decision.task or "", ())
        if decision.reason is not Reason.RETRIEVED or not words:
            return PromptDepth(decision.exit_layer)
        bias: tuple[tuple[int, float], ...] = ()
        if decision.label_bias:
            pairs = zip(words, decision.label_bias, strict=True)
            bias = tuple((token, value) for tokens, value in pairs for token in tokens)
        steers = self.plan.is_choice and (bool(bias) or not decision.is_full)
        first = tuple(sorted(token for tokens in words for token in tokens)) if steers else ()
        return PromptDepth(decision.exit_layer, bias, first)


@dataclass(frozen=True)
class Gate:
    """lookups, snapshot, reloader: None where a fixed depth leaves nothing to look up."""

    admission: Admission
    lookups: LookupBatcher | None
    detokenize: Detokenize
    metrics: DecisionMetrics
    snapshot: Snapshot | None = None
    reloader: TableReloader | None = None

    @property
    def latest(self) -> Gate:
        """This gate, or what has come in its place."""
        return self if self.reloader is None else self.reloader.gate

    async def admit(self, kind: Kind, body: dict[str, Any]) -> Admitted | None:
        """Decide every prompt of a body; None if it has none that vLLM would run.

        Raises OptionError for a bad `raee` object, and nothing else that a client can cause.
        """
        options = self.admission.options(body)
        raw = read_prompts(kind, body)
        if raw is None:
            return None
        prompts: Sequence[TextPrompt] = [None] * len(raw)
        if self.admission.needs_text(options):
            prompts = await self._texts(raw)
        plan = self.admission.plan(kind, body, options, prompts)
        decisions = await self._decided(plan.entries)
        self.metrics.record(decisions)
        return Admitted(decisions, plan)

    def close(self) -> None:
        if self.lookups is not None:
            self.lookups.close()

    async def _texts(self, prompts: Sequence[RawPrompt]) -> Sequence[TextPrompt]:
        """Token ids as text, decoded off the event loop; other prompts as they are."""

        def texts() -> list[TextPrompt]:
            return [self._text(p) if isinstance(p, tuple) else p for p in prompts]

        has_ids = any(isinstance(prompt, tuple) for prompt in prompts)
        return await asyncio.to_thread(texts) if has_ids else texts()

    def _text(self, ids: TokenIds) -> str | None:
        try:
            return self.detokenize(ids)
        except (OverflowError, ValueError, TypeError, IndexError):
            return None  # ids outside the vocabulary, to which vLLM has its own answer

    async def _decided(self, entries: Sequence[ExitDecision | Lookup]) -> tuple[ExitDecision, ...]:
        """The entries with every look-up replaced by its decision."""
        wanted = [entry for entry in entries if isinstance(entry, Lookup)]
        if not wanted:
            return tuple(entry for entry in entries if isinstance(entry, ExitDecision))
        assert self.lookups is not None
        found = iter(await self.lookups.decide(wanted))
        return tuple(next(found) if isinstance(entry, Lookup) else entry for entry in entries)
