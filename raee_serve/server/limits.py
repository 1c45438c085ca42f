"""Limits on a request's output, and what a label task may answer under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from raee_serve.errors import BindingError, TaskError
from raee_serve.records import ExitHead
from raee_serve.tasks.task import Task, answer_token_ids, prompt_text

MAX_BIAS = 100.0
"""Largest `logit_bias` vLLM applies; greater ones are clipped to it."""

LENGTHS = (
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "bad_words",
    "ignore_eos",
)
"""Fields that say where an answer ends, or what is not in it. An answer that is one label of a
named task ends where the label does, so client libraries may fill in what they like."""


@dataclass(frozen=True, slots=True)
class OutputLimit:
    """What a body lets the model say.

    spellings: strings of `structured_outputs.choice`; empty if not limited so.
    token_ids: `allowed_token_ids`; empty if not limited so.
    is_set: whether the body limits its output in any way, these or others.
    """

    spellings: tuple[str, ...]
    token_ids: frozenset[int]
    is_set: bool

    @classmethod
    def of(cls, body: dict[str, Any]) -> OutputLimit:
        structured = body.get("structured_outputs")
        is_replaced = _has_response_format(body) or _forces_a_tool(body)
        token_ids = body.get("allowed_token_ids")
        return cls(
            # Both take the place of structured_outputs in vLLM.
            spellings=() if is_replaced else _choices(structured),
            token_ids=_token_ids(token_ids),
            is_set=is_replaced or structured is not None or token_ids is not None,
        )


class Written(NamedTuple):
    """A label as it stands in an output."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AllowedLabels:
    """The labels that one request may be answered with.

    names: all labels of the task, in label order.
    written: each label as the request wants it written; None for a label that it excludes.
    head: what tells which of them it is.
    """

    names: tuple[str, ...]
    written: tuple[Written | None, ...]
    head: ExitHead

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """The tokens that an answer may begin with, ascending."""
        return tuple(sorted({label.token_ids[0] for label in self.written if label is not None}))

    def is_like(self, other: AllowedLabels) -> bool:
        """Whether exits of both answer the same question."""
        return (self.names, self.head) == (other.names, other.head)


@dataclass(frozen=True, slots=True)
class LabelOutputs:
    """The outputs of a label task under the server's tokenizer.

    names: its labels, in label order.
    own: each label as it continues a prompt (" great" after text, "great" in a chat).
    spellings: by text the place and the tokens of a label, with and without a space before it.
    plain_token_ids: first token of each label where all of these differ; else the LM head cannot
        tell the labels apart, and this is empty.
    is_fitted: whether the table has probes for the task.
    """

    names: tuple[str, ...]
    own: tuple[Written, ...]
    spellings: Mapping[str, tuple[int, Written]]
    plain_token_ids: tuple[int, ...]
    is_fitted: bool

    @classmethod
    def of(
        cls, task: Task, table_ids: Sequence[int], tokenizer: Any, is_fitted: bool
    ) -> LabelOutputs:
        """table_ids: the plain token ids that the table was built with, if it has any.

        Raises BindingError where the tokenizer gives others.
        """
        prompt = prompt_text(tokenizer, task.render("a text"))
        own = tuple(_written(tokenizer, text, prompt) for text in task.label_texts())
        plain_ids = tuple(label.token_ids[0] for label in own)
        if table_ids and plain_ids != tuple(table_ids):
            raise BindingError(
                f"task {task.name}: the table was built with label tokens {tuple(table_ids)}, "
                f"the server's tokenizer gives {plain_ids}; serve with the table's tokenizer"
            )
        spellings = {
            text: (place, _written(tokenizer, text))
            for place, name in enumerate(task.labels)
            for text in (name, f" {name}")
        }
        spellings |= {label.text: (place, label) for place, label in enumerate(own)}
        return cls(task.labels, own, spellings, tuple(table_ids), is_fitted)

    def heads(self, first: ExitHead | None = None) -> tuple[ExitHead, ...]:
        """Those that can tell the labels, the task's own first unless another one is to be."""
        heads: list[ExitHead] = ["probe"] if self.is_fitted else []
        heads += ["plain"] if self.plain_token_ids else []
        return tuple(sorted(heads, key=lambda head: head != first))

    def under(self, limit: OutputLimit, head: ExitHead) -> AllowedLabels | None:
        """The labels that `limit` allows, written as it asks; None where it allows anything else.

        A label that may be written in several ways is written as it is without a limit.
        """
        if not limit.is_set:
            return AllowedLabels(self.names, self.own, head)
        if bool(limit.spellings) == bool(limit.token_ids):  # neither is there, or both are
            return None
        texts = set(limit.spellings)
        if limit.token_ids:
            known = zip(self.plain_token_ids, self.own, strict=False)
            texts = {label.text for token, label in known if token in limit.token_ids}
        if len(texts) < len(limit.token_ids) or not texts.issubset(self.spellings):
            return None
        written = dict(self.spellings[text] for text in texts)
        written |= {n: label for n, label in enumerate(self.own) if label.text in texts}
        return AllowedLabels(self.names, tuple(map(written.get, range(len(self.own)))), head)

    def impose(self, body: dict[str, Any]) -> dict[str, Any]:
        """A copy of an unlimited body that makes the LM head answer one of the labels."""
        first_tokens = [label.token_ids[0] for label in self.own]
        if all(len(label.token_ids) == 1 for label in self.own):
            return one_answer(body) | {"allowed_token_ids": first_tokens}
        return one_answer(body) | {
            "structured_outputs": {"choice": [label.text for label in self.own]},
            "logit_bias": _biased(body.get("logit_bias"), first_tokens),
            # A token is at least one byte, so this covers every spelling of the longest text.
            "max_tokens": 1 + max(len(label.text.encode()) for label in self.own),
        }


def one_answer(body: dict[str, Any]) -> dict[str, Any]:
    """A copy of `body` without the `LENGTHS` of the client's, whose answer is one token."""
    return {key: value for key, value in body.items() if key not in LENGTHS} | {"max_tokens": 1}


def with_first_tokens(bias: Mapping[Any, float], tokens: Sequence[Any]) -> dict[Any, float]:
    """`bias` with `tokens` raised above every other; their own biases keep their differences.

    The grammar of a choice also admits pieces of its words (" gr" + "eat"). What those say about
    the label is unknown: tables hold what each layer says at the words' first tokens.
    """
    own = {token: bias.get(token, 0.0) for token in tokens}
    raise_by = MAX_BIAS - max(own.values(), default=0.0)
    return {**bias, **{token: value + raise_by for token, value in own.items()}}


def _written(tokenizer: Any, text: str, prompt: str = "") -> Written:
    """A label's text with the tokens that it adds to `prompt`.

    Where it would change the prompt's own tokens they are those that it has alone.
    """
    try:
        return Written(text, tuple(answer_token_ids(tokenizer, prompt, text)))
    except TaskError:
        return Written(text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _biased(client: Any, tokens: Sequence[int]) -> Any:
    """A body's `logit_bias` with `tokens` raised; as it came if malformed, for vLLM to refuse."""
    bias = {} if client is None else client
    if not isinstance(bias, dict) or not all(isinstance(v, int | float) for v in bias.values()):
        return client
    return with_first_tokens(bias, [str(token) for token in tokens])


def _has_response_format(body: dict[str, Any]) -> bool:
    wanted = body.get("response_format")
    return wanted is not None and not (isinstance(wanted, dict) and wanted.get("type") == "text")


def _forces_a_tool(body: dict[str, Any]) -> bool:
    return body.get("tool_choice") not in (None, "none", "auto")


def _choices(structured: Any) -> tuple[str, ...]:
    choice = structured.get("choice") if isinstance(structured, dict) else None
    if not isinstance(choice, list) or not all(isinstance(item, str) for item in choice):
        return ()
    return tuple(choice)


def _token_ids(allowed: Any) -> frozenset[int]:
    if not isinstance(allowed, list) or not all(isinstance(item, int) for item in allowed):
        return frozenset()
    return frozenset(allowed)
