"""The gate every request passes: plan, look up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from raee_serve.errors import TaskError
from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.server.access import Access
from raee_serve.server.admission import Admission, Plan
from raee_serve.server.depths import Comparison, PromptDepth
from raee_serve.server.label_answers import LabelAnswer
from raee_serve.server.lookup import LookupBatcher
from raee_serve.server.metrics import DecisionMetrics
from raee_serve.server.options import OptionError, RaeeOptions, RequestError
from raee_serve.server.probe_sets import ProbeSets
from raee_serve.server.prompts import Kind, RawPrompt, TextPrompt, TokenIds, read_prompts
from raee_serve.server.reload import Snapshot, TableReloader
from raee_serve.server.sampling import FullDepthSampler
from raee_serve.server.valves import Valves, in_shadow
from raee_serve.tasks.prompts import Rendered

if TYPE_CHECKING:
    from raee_serve.retrieval.retriever import ProbeSet

Detokenize = Callable[[Sequence[int]], str]
Encode = Callable[[Rendered], list[int]]


def _no_tokenizer(_: Rendered) -> list[int]:
    raise TaskError("this server has no tokenizer")


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
        if not self.valves.shadow:
            return self.decided
        return tuple(in_shadow(decision, self.plan.alone) for decision in self.decided)

    def depths(self, *, wants_labels: bool = False) -> list[PromptDepth]:
        """How each prompt is to run, in prompt order.

        wants_labels: whether the engine is to tell the probabilities of all labels.
        """
        return [self._prompt_depth(decision, wants_labels) for decision in self.decided]

    def _prompt_depth(self, decision: ExitDecision, wants_labels: bool) -> PromptDepth:
        """A prompt's depth, its guard, and the other depth where there are two: decided and full.

        Beam search has neither: it runs many generations of one token a prompt.
        """
        at_full = ExitDecision.full(decision.num_layers, decision.reason, task=decision.task)
        full = self._depth(self.plan.without_look_up(at_full), wants_labels)
        decided = self._depth(decision, wants_labels)
        run, other = (full, decided) if self.valves.shadow else (decided, full)
        if run == other or self.plan.body.get("use_beam_search"):
            return run
        is_free = decision.task not in self.plan.labels
        guard = self.valves.guard(decision, self.options.loop_guard, is_free)
        return replace(run, comparison=Comparison(other, decision.task or "-"), guard=guard)

    def _depth(self, decision: ExitDecision, wants_labels: bool) -> PromptDepth:
        labels = self.plan.labels.get(decision.task or "")
        if decision.probe is not None:
            assert labels is not None
            answer = LabelAnswer(
                labels,
                self.plan.probe_set,
                decision.probe,
                decision.label_scores,
                self.plan.is_greedy,
                wants_labels,
            )
            return PromptDepth(decision.exit_layer, decision.head, answer)
        is_early = decision.reason is Reason.RETRIEVED and not decision.is_full
        steered = labels if is_early and self.plan.is_choice else None
        first_tokens = () if steered is None else steered.first_tokens
        return PromptDepth(decision.exit_layer, decision.head, first_tokens=first_tokens)


@dataclass(frozen=True)
class Gate:
    """lookups, snapshot, reloader: None where a fixed depth leaves nothing to look up.

    sampler: None unless a share of the prompts runs at both depths.
    probe_set: the table's probes; None without any. probes: those that the engine holds.
    encode: a rendered prompt as the tokens that vLLM makes of it. Raises RaeeError.
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
    probe_set: ProbeSet | None = None
    probes: ProbeSets = field(default_factory=ProbeSets)
    encode: Encode = _no_tokenizer
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

    async def admit_rendered(
        self, kind: Kind, body: dict[str, Any], prompts: Sequence[Rendered]
    ) -> Admitted:
        """As `admit`, of prompts that are not in the body."""
        return await self._planned(kind, body, self._options(body), prompts)

    def in_use(self) -> AbstractContextManager[None]:
        """Within it the probes of this gate stay loaded."""
        return self.probes.in_use(self.admission.probe_set)

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
        return await self._planned(kind, body, options, prompts)

    async def _planned(
        self,
        kind: Kind,
        body: dict[str, Any],
        options: RaeeOptions,
        prompts: Sequence[TextPrompt],
    ) -> Admitted:
        plan = self.admission.plan(kind, body, options, prompts)
        decided = tuple(map(plan.without_look_up, await self._decided(plan.entries)))
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
