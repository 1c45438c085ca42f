"""From a parsed request body to one entry per prompt: decided already, or to be looked up.

No I/O and no HTTP. What cannot be known here (the neighbours) is left as a `Lookup`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raee_serve.errors import RaeeError
from raee_serve.exits.fit import ALONE
from raee_serve.records import ExitDecision, ExitHead, Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.server.limits import AllowedLabels, LabelOutputs, OutputLimit, one_answer
from raee_serve.server.options import OptionError, RaeeOptions, parse_options
from raee_serve.server.prompts import (
    Kind,
    TextPrompt,
    is_rendered_plainly,
    is_text,
    scores_prompt,
    whole_text,
)
from raee_serve.server.valves import Valves
from raee_serve.tasks.task import Task


@dataclass(frozen=True, slots=True)
class Plan:
    """entries: one per prompt, in prompt order. body: what vLLM is to see.

    labels: what may be answered, by label task, of those whose labels the output is limited to.
    is_choice: whether a grammar limits it, which also admits pieces of the labels: an exit through
        the LM head is meaningful only if the first token of one is sampled first.
    probe_set: id of the probes that answer.
    alone: probe for prompts without a look-up to go by; None unless the request names a label task
        that is answered by probe.
    is_greedy: the request states no temperature.
    """

    entries: tuple[ExitDecision | Lookup, ...]
    body: dict[str, Any]
    labels: Mapping[str, AllowedLabels] = field(default_factory=dict)
    is_choice: bool = False
    probe_set: str = ""
    alone: str | None = None
    is_greedy: bool = True

    def without_look_up(self, decision: ExitDecision) -> ExitDecision:
        """`decision`, or, where it names no probe and `alone` is to answer, full depth by that.

        A prompt that was recognised and not named gets vanilla's answer where its look-up decided
        nothing.
        """
        if self.alone is None and decision.reason in (Reason.FAR, Reason.NO_EVIDENCE):
            return replace(decision, head="plain", probe=None, label_scores=())
        if self.alone is None or decision.probe is not None:
            return decision
        task, layer = self.alone.rpartition("/")[0], decision.num_layers
        return replace(decision, exit_layer=layer, task=task, head="probe", probe=self.alone)


@dataclass(frozen=True)
class Admission:
    """The rules by which requests get their exit layers.

    tasks: what the loaded table knows; empty without a table.
    labels: outputs of those tasks that are label tasks.
    fixed_layer: depth of every request that asks for none; None where look-ups decide.
    k, head: defaults for look-ups; None leaves them to the retriever.
    served_names: what the backbone is called; any other model name is a LoRA adapter's.
    off: vanilla vLLM for everybody, whatever a request asks for.
    shortcut_layers: those at which the engine has shortcuts, ascending.
    probe_set: id of the table's probes.
    """

    num_layers: int
    tasks: Mapping[str, Task] = field(default_factory=dict)
    labels: Mapping[str, LabelOutputs] = field(default_factory=dict)
    fixed_layer: int | None = None
    k: int | None = None
    head: ExitHead | None = None
    served_names: Sequence[str] = ()
    valves: Valves = field(default_factory=Valves)
    off: bool = False
    shortcut_layers: tuple[int, ...] = ()
    probe_set: str = ""

    @property
    def default_layer(self) -> int:
        """Depth of a prompt about which nothing was decided."""
        if self.fixed_layer is None or self.valves.shadow:
            return self.num_layers
        return self.fixed_layer

    def options(self, body: dict[str, Any]) -> RaeeOptions:
        """The body's `raee` object, checked. Raises OptionError."""
        if self.off:
            return RaeeOptions(off=True)
        options = parse_options(
            body.get("raee"),
            num_layers=self.num_layers,
            tasks=self.tasks,
            shortcut_layers=self.shortcut_layers,
        )
        self._check_head(options)
        least = self.valves.least_layer([options.task] if options.task else [])
        if options.exit_layer is not None and options.exit_layer < least:
            raise OptionError(
                "raee.exit_layer",
                f"raee.exit_layer is {options.exit_layer}; allowed on this server "
                f"(--min-exit-layer): {least}..{self.num_layers}",
            )
        return options

    def heads_of(self, task: str) -> tuple[ExitHead, ...]:
        """The heads through which a task can leave, of a label task its own first."""
        if task in self.labels:
            return self.labels[task].heads(self.head)
        return ("plain", "shortcut") if self.shortcut_layers else ("plain",)

    def check_heads(self) -> None:
        """Raises RaeeError for a `head` that is not every label task's."""
        for name in self.labels:
            if self.head is not None and self.head not in self.heads_of(name):
                allowed = ", ".join(self.heads_of(name)) or "none, it cannot be served"
                raise RaeeError(f"--head is {self.head}; allowed for the task {name!r}: {allowed}")

    def needs_text(self, options: RaeeOptions) -> bool:
        """Whether the prompts' texts bear on the plan."""
        if options.off or self.fixed_layer is not None:
            return False
        return options.exit_layer is None or bool(self.labels)

    def plan(
        self,
        kind: Kind,
        body: dict[str, Any],
        options: RaeeOptions,
        prompts: Sequence[TextPrompt],
    ) -> Plan:
        """One entry per prompt, and the body without `raee` and with label limits set.

        Naming a label task makes the answer one of its labels at any depth, unless the client
        limited its output otherwise: then what the client wrote stands. `off` sets no limit either.
        Raises OptionError for a probe that was asked for where none can answer.
        """
        body = {key: value for key, value in body.items() if key != "raee"}
        if options.off:
            return Plan((self._full(Reason.OFF, options.task),) * len(prompts), body)
        if self.fixed_layer is not None:
            layer = options.exit_layer or self.fixed_layer
            return Plan((self._override(layer, options),) * len(prompts), body)
        vanilla, is_plain = self._vanilla(body), is_rendered_plainly(kind, body)
        plan = self._labelled(options, body, may_probe=vanilla is None)
        if vanilla and options.exit_layer is None:
            entry = self._full(vanilla, options.task)
            return Plan((entry,) * len(prompts), plan.body)
        entries = (self._entry(plan, options, prompt, is_plain) for prompt in prompts)
        return replace(plan, entries=tuple(entries))

    def _check_head(self, options: RaeeOptions) -> None:
        """Raises OptionError for a head that the named task does not have."""
        allowed = self.heads_of(options.task) if options.task else ()
        if options.task and options.head and options.head not in allowed:
            raise OptionError(
                "raee.head",
                f"raee.head is {options.head!r}; allowed for the task {options.task!r}: "
                f"{', '.join(allowed) or 'none'}",
            )

    def _vanilla(self, body: dict[str, Any]) -> Reason | None:
        """Why no prompt of a body may exit early, if so."""
        if self._is_adapter(body.get("model")):
            return Reason.ADAPTER
        if body.get("use_beam_search"):  # vLLM's beam search heeds no limit on the output
            return Reason.UNCONSTRAINED
        return None

    def _is_adapter(self, model: Any) -> bool:
        """Whether a body's model is not the backbone; vLLM takes an empty name for it, and refuses
        what is no name."""
        if not self.served_names or not isinstance(model, str):
            return False
        return bool(model) and model not in self.served_names

    def _labelled(self, options: RaeeOptions, body: dict[str, Any], *, may_probe: bool) -> Plan:
        """What label tasks may answer to a body, and the body that sees to it; no entries yet."""
        limit, is_scored, name = OutputLimit.of(body), scores_prompt(body), options.task
        named = self.labels.get(name) if name else None
        names = [name] if name else list(self.labels) if limit.is_set else []
        found = {
            task: self._allowed(self.labels[task], options, limit, may_probe and not is_scored)
            for task in names
            if task in self.labels
        }
        labels = {task: allowed for task, allowed in found.items() if allowed is not None}
        alone = None
        if named and name in labels and labels[name].head == "probe":
            body, alone = one_answer(body), f"{name}/{ALONE}"
        elif named and is_scored and not limit.is_set:
            labels = {}
        elif named and not limit.is_set:
            body = named.impose(body)
            limit = OutputLimit.of(body)
        is_greedy = body.get("temperature") is None
        return Plan((), body, labels, bool(limit.spellings), self.probe_set, alone, is_greedy)

    def _allowed(
        self, outputs: LabelOutputs, options: RaeeOptions, limit: OutputLimit, may_probe: bool
    ) -> AllowedLabels | None:
        """What a task may answer under a limit. Behind a shortcut labels are the LM head's matter,
        as they are without one."""
        head = options.head or next(iter(outputs.heads(self.head)), "plain")
        if head == "probe":
            return outputs.under(limit, "probe") if may_probe and outputs.is_fitted else None
        return outputs.under(limit, "plain") if outputs.plain_token_ids else None

    def _entry(
        self, plan: Plan, options: RaeeOptions, prompt: TextPrompt, is_plain: bool
    ) -> ExitDecision | Lookup:
        """is_plain: the prompt is rendered as the table's prompts were."""
        matches = self._named(options.task, prompt) if options.task else {}
        if not options.task and is_plain and prompt is not None:
            matches = self._matching(prompt)
        candidates = self._candidates(list(matches), plan.labels)
        labels = plan.labels.get(candidates[0]) if candidates else None
        by_probe = labels is not None and labels.head == "probe"
        if options.exit_layer is not None and not (by_probe or plan.alone):
            return self._override(options.exit_layer, options)
        if not matches:
            return self._full(Reason.UNMATCHED, options.task)
        if not candidates:
            only = next(iter(matches)) if len(matches) == 1 else None
            return self._full(Reason.UNCONSTRAINED, only)
        key = matches[candidates[0]]
        if not is_text(key):
            return self._full(Reason.ERROR, options.task)
        head = options.head if labels is None else labels.head
        return Lookup(
            candidates=tuple(name for name in candidates if matches[name] == key),
            key_text=key,
            k=options.k or self.k,
            head="plain" if head == "plain" else None,
            min_layer=self.valves.least_layer(candidates),
            explain=options.explain,
            budget=options.budget,
            exit_layer=options.exit_layer,
        )

    def _override(self, layer: int, options: RaeeOptions) -> ExitDecision:
        """At a depth that was asked for, without a look-up. Raises OptionError for a probe."""
        head = options.head or "plain"
        if head == "probe":
            fitted = [name for name, outputs in self.labels.items() if outputs.is_fitted]
            raise OptionError(
                "raee.head",
                "raee.head is 'probe', and no probe can answer a prompt of this request; allowed: "
                f"with raee.task, one of {', '.join(sorted(fitted)) or 'none on this server'}",
            )
        return ExitDecision(layer, self.num_layers, Reason.OVERRIDE, options.task, head=head)

    def _named(self, name: str, prompt: TextPrompt) -> dict[str, str]:
        """The named task and its key: what fills the template, else the prompt as a whole."""
        task, whole = self.tasks[name], whole_text(prompt)
        if prompt is None or whole is None:
            return {}
        return {name: task.match(prompt) or task.match(whole) or whole}

    def _matching(self, prompt: str | Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Tasks whose template the prompt was rendered from, with the text that fills it."""
        return {name: key for name, task in self.tasks.items() if (key := task.match(prompt))}

    def _candidates(self, names: Sequence[str], labels: Mapping[str, AllowedLabels]) -> list[str]:
        """The tasks to search together: free text, or labels that the output is limited to.

        Several tasks may share a template. Those whose labels are exactly the limit come first, and
        only tasks with the same labels and head are searched together, for only their rows' exit
        information can be compared.
        """
        limited = [name for name in names if name in labels]
        if not limited:
            return [name for name in names if name not in self.labels]
        exact = [name for name in limited if None not in labels[name].written]
        first = labels[(exact or limited)[0]]
        return [name for name in limited if labels[name].is_like(first)]

    def _full(self, reason: Reason, task: str | None) -> ExitDecision:
        return ExitDecision.full(self.num_layers, reason, task=task)
