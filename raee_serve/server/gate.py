"""The gate every request passes: plan, look up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.server.access import Access
from raee_serve.server.admission import Admission, Plan
from raee_serve.server.depths import Comparison, PromptDepth
from raee_serve.server.lookup import LookupBatcher
from raee_serve.server.metrics import DecisionMetrics
from raee_serve.server.options import OptionError, RaeeOptions, RequestError
from raee_serve.server.prompts import Kind, RawPrompt, TextPrompt, TokenIds, read_prompts
from raee_serve.server.reload import Snapshot, TableReloader
from raee_serve.server.sampling import FullDepthSampler
from raee_serve.server.valves import Valves, in_shadow

Detokenize = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Admitted:
    """decided: one per prompt, in prompt order. plan: what they were made from.

    valves: how far what was decided is run. options: what the request asked for.
    """

    decided: tuple[ExitDecision, ...]
    plan: Plan
    valves: Valves
    options: RaeeOptions

    @property
    def explain(self) -> bool:
        """Whether the answer is to say why."""
        return self.options.explain

    @property
    def decisions(self) -> tuple[ExitDecision, ...]:
        """What is run, and why."""
        return tuple(map(in_shadow, self.decided)) if self.valves.shadow else self.decided

    @property
    def depths(self) -> list[PromptDepth]:
        """How each prompt is to run, in prompt order."""
        return [self._prompt_depth(decision) for decision in self.decided]

    def _prompt_depth(self, decision: ExitDecision) -> PromptDepth:
        """A prompt's depth, its guard, and the other depth where there are two: decided and full.

        Beam search has neither: it runs many generations of one token a prompt.
        """
        decided, full = self._depth(decision), PromptDepth(decision.num_layers)
        run, other = (full, decided) if self.valves.shadow else (decided, full)
        if run == other or self.plan.body.get("use_beam_search"):
            return run
        is_free = decision.task not in self.plan.label_tokens
        guard = self.valves.guard(decision, self.options.loop_guard, is_free)
        return replace(run, comparison=Comparison(other, decision.task or "-"), guard=guard)

    def _depth(self, decision: ExitDecision) -> PromptDepth:
        words = self.plan.label_tokens.get(decision.task or "", ())
        if decision.reason is not Reason.RETRIEVED or not words:
            return PromptDepth(decision.exit_layer, exit_head=decision.exit_head)
        bias: tuple[tuple[int, float], ...] = ()
        if decision.label_bias:
            pairs = zip(words, decision.label_bias, strict=True)
            bias = tuple((token, value) for tokens, value in pairs for token in tokens)
        steers = self.plan.is_choice and (bool(bias) or not decision.is_full)
        first = tuple(sorted(token for tokens in words for token in tokens)) if steers else ()
        return PromptDepth(decision.exit_layer, bias, first, exit_head=decision.exit_head)


@dataclass(frozen=True)
class Gate:
    """lookups, snapshot, reloader: None where a fixed depth leaves nothing to look up.

    sampler: None unless a share of the prompts runs at both depths.
    has_chat_template: whether the server can take chats.
    """

    admission: Admission
    lookups: LookupBatcher | None
    detokenize: Detokenize
    metrics: DecisionMetrics
    access: Access = field(default_factory=Access)
    sampler: FullDepthSampler | None = None
    snapshot: Snapshot | None = None
    reloader: TableReloader | None = None
    has_chat_template: bool = False

    @property
    def latest(self) -> Gate:
        """This gate, or what has come in its place."""
        return self if self.reloader is None else self.reloader.gate

    @property
    def table_version(self) -> int | None:
        """None without a table."""
        return None if self.snapshot is None else self.snapshot.version

    async def admit(self, kind: Kind, body: dict[str, Any]) -> Admitted | None:
        """Decide every prompt of a body; None if it has none that vLLM would run.

        Raises RequestError for a bad `raee` object or too many prompts, and nothing else that a
        client can cause.
        """
        return await self._admitted(kind, body, self._options(body))

    async def preview(self, kind: Kind, body: dict[str, Any]) -> Admitted | None:
        """As `admit`, and explained where the server explains."""
        options = self._options(body)
        return await self._admitted(
            kind, body, replace(options, explain=self.access.allows("explain"))
        )

    async def _admitted(
        self, kind: Kind, body: dict[str, Any], options: RaeeOptions
    ) -> Admitted | None:
        raw = read_prompts(kind, body)
        if raw is None:
            return None
        if len(raw) > self.access.max_prompts:
            raise RequestError(
                "prompt",
                f"prompt holds {len(raw)} prompts; allowed: at most "
                f"{self.access.max_prompts} (--max-prompts)",
            )
        prompts: Sequence[TextPrompt] = [None] * len(raw)
        if self.admission.needs_text(options):
            prompts = await self._texts(raw)
        plan = self.admission.plan(kind, body, options, prompts)
        decided = await self._decided(plan.entries)
        return Admitted(decided, plan, self.admission.valves, options)

    def close(self) -> None:
        if self.lookups is not None:
            self.lookups.close()
        if self.sampler is not None:
            self.sampler.close()

    def _options(self, body: dict[str, Any]) -> RaeeOptions:
        options = self.admission.options(body)
        if options.explain and not self.access.allows("explain"):
            raise OptionError("raee.explain", "raee.explain is switched off (--disable-explain)")
        return options

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
