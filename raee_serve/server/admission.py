"""From a parsed request body to one entry per prompt: decided already, or to be looked up.

No I/O and no HTTP. What cannot be known here (the neighbours) is left as a `Lookup`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.aggregate import RULE_NAMES
from raee_serve.retrieval.lookup import Lookup
from raee_serve.server.limits import LabelOutputs, LabelTokens, OutputLimit
from raee_serve.server.options import OptionError, RaeeOptions, parse_options
from raee_serve.server.prompts import Kind, TextPrompt, is_rendered_plainly, is_text, whole_text
from raee_serve.server.valves import Valves
from raee_serve.table.task import Task


@dataclass(frozen=True, slots=True)
class Plan:
    """entries: one per prompt, in prompt order. body: what vLLM is to see.

    label_tokens: for each task whose label words limit the output, and each of these words, the
        first tokens with which it may be spelled.
    is_choice: whether a grammar limits it, which also admits pieces of the words: a retrieved exit
        is meaningful only if one of those tokens is sampled first.
    """

    entries: tuple[ExitDecision | Lookup, ...]
    body: dict[str, Any]
    label_tokens: Mapping[str, LabelTokens] = field(default_factory=dict)
    is_choice: bool = False


@dataclass(frozen=True)
class Admission:
    """The rules by which requests get their exit layers.

    tasks: what the loaded table knows; empty without a table.
    labels: outputs of those tasks that are label-word tasks.
    fixed_layer: depth of every request that asks for none; None where look-ups decide.
    k, rule: defaults for look-ups; None leaves them to the retriever.
    served_names: what the backbone is called; any other model name is a LoRA adapter's.
    off: vanilla vLLM for everybody, whatever a request asks for.
    shortcut_layers: those at which the engine has shortcuts, ascending.
    """

    num_layers: int
    tasks: Mapping[str, Task] = field(default_factory=dict)
    labels: Mapping[str, LabelOutputs] = field(default_factory=dict)
    fixed_layer: int | None = None
    k: int | None = None
    rule: str | None = None
    served_names: Collection[str] = ()
    valves: Valves = field(default_factory=Valves)
    off: bool = False
    shortcut_layers: tuple[int, ...] = ()

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
            rules=RULE_NAMES,
            shortcut_layers=self.shortcut_layers,
        )
        least = self.valves.least_layer([options.task] if options.task else [])
        if options.exit_layer is not None and options.exit_layer < least:
            raise OptionError(
                "raee.exit_layer",
                f"raee.exit_layer is {options.exit_layer}; allowed on this server "
                f"(--min-exit-layer): {least}..{self.num_layers}",
            )
        return options

    def needs_text(self, options: RaeeOptions) -> bool:
        """Whether the prompts' texts bear on the plan."""
        return not options.off and options.exit_layer is None and self.fixed_layer is None

    def plan(
        self,
        kind: Kind,
        body: dict[str, Any],
        options: RaeeOptions,
        prompts: Sequence[TextPrompt],
    ) -> Plan:
        """One entry per prompt, and the body without `raee` and with label limits set.

        Naming a label-word task limits the output to its label words at any depth, unless the
        client limited it already: then what the client wrote stands. `off` sets no limit either.
        """
        body = {key: value for key, value in body.items() if key != "raee"}
        if options.off:
            return Plan((self._full(Reason.OFF, options.task),) * len(prompts), body)
        limit = OutputLimit.of(body)
        label = self.labels.get(options.task) if options.task else None
        if label is not None and not limit.is_set:
            body = label.impose(body)
            limit = OutputLimit.of(body)
        fixed = self.fixed_layer if options.exit_layer is None else options.exit_layer
        if fixed is not None:
            decision = ExitDecision(
                fixed, self.num_layers, Reason.OVERRIDE, options.task, exit_head=options.exit_head
            )
            return Plan((decision,) * len(prompts), body)
        if self._is_adapter(body.get("model")):
            return Plan((self._full(Reason.ADAPTER, options.task),) * len(prompts), body)
        if body.get("use_beam_search"):  # vLLM's beam search heeds no limit on the output
            return Plan((self._full(Reason.UNCONSTRAINED, options.task),) * len(prompts), body)
        plain = is_rendered_plainly(kind, body)
        entries = tuple(self._entry(options, limit, prompt, plain) for prompt in prompts)
        tokens = {
            name: label.tokens_under(limit)
            for name, label in self.labels.items()
            if label.allow_all_of(limit)
        }
        return Plan(entries, body, tokens, bool(limit.choices))

    def _is_adapter(self, model: Any) -> bool:
        """Whether a body's model is not the backbone; vLLM takes an empty name for it, and refuses
        what is no name."""
        if not self.served_names or not isinstance(model, str):
            return False
        return bool(model) and model not in self.served_names

    def _entry(
        self, options: RaeeOptions, limit: OutputLimit, prompt: TextPrompt, plain: bool
    ) -> ExitDecision | Lookup:
        matches = self._named(options.task, prompt) if options.task else {}
        if not options.task and plain and prompt is not None:
            matches = self._matching(prompt)
        if not matches:
            return self._full(Reason.UNMATCHED, options.task)
        candidates = self._candidates(list(matches), limit)
        if not candidates:
            only = next(iter(matches)) if len(matches) == 1 else None
            return self._full(Reason.UNCONSTRAINED, only)
        key = matches[candidates[0]]
        if not is_text(key):
            return self._full(Reason.ERROR, options.task)
        return Lookup(
            candidates=tuple(name for name in candidates if matches[name] == key),
            key_text=key,
            k=options.k or self.k,
            rule=options.rule or self.rule,
            min_layer=self.valves.least_layer(candidates),
            explain=options.explain,
            quality=options.quality,
        )

    def _named(self, name: str, prompt: TextPrompt) -> dict[str, str]:
        """The named task and its key: what fills the template, else the prompt as a whole."""
        task, whole = self.tasks[name], whole_text(prompt)
        if prompt is None or whole is None:
            return {}
        return {name: task.match(prompt) or task.match(whole) or whole}

    def _matching(self, prompt: str | Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Tasks whose template the prompt was rendered from, with the text that fills it."""
        return {name: key for name, task in self.tasks.items() if (key := task.match(prompt))}

    def _candidates(self, names: Sequence[str], limit: OutputLimit) -> list[str]:
        """The tasks to search together: free text, or label words that the output is limited to.

        Several tasks may share a template. Those whose label words are exactly the limit come
        first, and only tasks with the same label words are searched together, for only their
        rows' exit information can be compared.
        """
        limited = [
            name for name in names if name in self.labels and self.labels[name].allow_all_of(limit)
        ]
        if limited:
            exact = [name for name in limited if self.labels[name].equal(limit)]
            words = self.labels[(exact or limited)[0]].words
            return [name for name in limited if self.labels[name].words == words]
        return [name for name in names if name not in self.labels]

    def _full(self, reason: Reason, task: str | None) -> ExitDecision:
        return ExitDecision.full(self.num_layers, reason, task=task)
