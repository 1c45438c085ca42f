"""Limits on a request's output, and a task's label words as such a limit.

An exit before full depth is meaningful for a label-word task only while nothing but its label
words can be sampled: elsewhere the early layers of a plain backbone give noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raee_serve.errors import BindingError
from raee_serve.table.task import Task, answer_token_ids, prompt_text

MAX_BIAS = 100.0
"""Largest `logit_bias` vLLM applies; greater ones are clipped to it."""

LabelTokens = tuple[tuple[int, ...], ...]
"""For each label word the first tokens with which an output may spell it."""


@dataclass(frozen=True, slots=True)
class OutputLimit:
    """What a body lets the model say.

    spellings: strings of `structured_outputs.choice`; empty if not limited so.
    token_ids: `allowed_token_ids`; None if not limited so.
    is_set: whether the body limits its output in any way, these or others.
    """

    spellings: frozenset[str]
    token_ids: frozenset[int] | None
    is_set: bool

    @property
    def choices(self) -> frozenset[str]:
        """The choices as words: without a leading space."""
        return frozenset(spelling.removeprefix(" ") for spelling in self.spellings)

    @classmethod
    def of(cls, body: dict[str, Any]) -> OutputLimit:
        structured = body.get("structured_outputs")
        is_replaced = _has_response_format(body) or _forces_a_tool(body)
        token_ids = body.get("allowed_token_ids")
        return cls(
            # Both take the place of structured_outputs in vLLM.
            spellings=frozenset() if is_replaced else _choices(structured),
            token_ids=_token_ids(token_ids),
            is_set=is_replaced or structured is not None or token_ids is not None,
        )


@dataclass(frozen=True, slots=True)
class LabelOutputs:
    """The outputs of a label-word task.

    words: label words, in label order.
    texts: the words as they continue a prompt (" great" after text, "great" in a chat).
    token_ids: first token of each text; all different.
    single_token: whether every text is that one token.
    spellings: first token of each word with and without a space before it.
    """

    words: tuple[str, ...]
    texts: tuple[str, ...]
    token_ids: tuple[int, ...]
    single_token: bool
    spellings: Mapping[str, int]

    @classmethod
    def of(cls, task: Task, table_ids: Sequence[int], tokenizer: Any) -> LabelOutputs:
        """The outputs of `task` under the server's tokenizer.

        table_ids: the label tokens the table was built with; BindingError unless they agree.
        """
        token_ids = task.label_token_ids(tokenizer)
        if token_ids != tuple(table_ids):
            raise BindingError(
                f"task {task.name}: the table was built with label tokens {tuple(table_ids)}, "
                f"the server's tokenizer gives {token_ids}; serve with the table's tokenizer"
            )
        prompt = prompt_text(tokenizer, task.render("a text"))
        texts = task.label_texts()
        return cls(
            words=task.label_words,
            texts=texts,
            token_ids=token_ids,
            single_token=all(len(answer_token_ids(tokenizer, prompt, t)) == 1 for t in texts),
            spellings=_spellings(tokenizer, task.label_words)
            | dict(zip(texts, token_ids, strict=True)),
        )

    def allow_all_of(self, limit: OutputLimit) -> bool:
        """Whether a limited output can be nothing but label words."""
        return _within(limit.choices, self.words) or _within(limit.token_ids, self.token_ids)

    def equal(self, limit: OutputLimit) -> bool:
        """Whether the limit is exactly this task's label words."""
        return limit.choices == set(self.words) or limit.token_ids == set(self.token_ids)

    def impose(self, body: dict[str, Any]) -> dict[str, Any]:
        """A copy of an unlimited body whose output is limited to the label words."""
        if self.single_token:
            return _with_max_tokens(body | {"allowed_token_ids": list(self.token_ids)}, 1)
        limited = body | {
            "structured_outputs": {"choice": list(self.texts)},
            "logit_bias": _biased(body.get("logit_bias"), self.token_ids),
        }
        # A token is at least one byte, so this covers every spelling of the longest text.
        return _with_max_tokens(limited, 1 + max(len(text.encode()) for text in self.texts))

    def tokens_under(self, limit: OutputLimit) -> LabelTokens:
        """For each label word the first tokens with which `limit` lets it be spelled."""
        if not limit.choices:
            return tuple((token,) for token in self.token_ids)

        def first_tokens(word: str) -> set[int]:
            return {self.spellings[s] for s in limit.spellings if s.removeprefix(" ") == word}

        return tuple(tuple(sorted(first_tokens(word))) for word in self.words)


def with_first_tokens(bias: Mapping[Any, float], tokens: Sequence[Any]) -> dict[Any, float]:
    """`bias` with `tokens` raised above every other; their own biases keep their differences.

    The grammar of a choice also admits pieces of its words (" gr" + "eat"). What those say about
    the label is unknown: tables hold what each layer says at the words' first tokens.
    """
    own = {token: bias.get(token, 0.0) for token in tokens}
    raise_by = MAX_BIAS - max(own.values(), default=0.0)
    return {**bias, **{token: value + raise_by for token, value in own.items()}}


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


def _choices(structured: Any) -> frozenset[str]:
    choice = structured.get("choice") if isinstance(structured, dict) else None
    if not isinstance(choice, list) or not all(isinstance(item, str) for item in choice):
        return frozenset()
    return frozenset(choice)


def _spellings(tokenizer: Any, words: Sequence[str]) -> dict[str, int]:
    written = [spelling for word in words for spelling in (word, f" {word}")]
    return {s: tokenizer(s, add_special_tokens=False)["input_ids"][0] for s in written}


def _token_ids(allowed: Any) -> frozenset[int] | None:
    if not isinstance(allowed, list) or not all(isinstance(item, int) for item in allowed):
        return None
    return frozenset(allowed)


def _within(limit: frozenset | None, allowed: Sequence) -> bool:
    return limit is not None and bool(limit) and limit.issubset(allowed)


def _with_max_tokens(body: dict[str, Any], default: int) -> dict[str, Any]:
    """`body` with a default for its output length, unless the client set one."""
    if body.get("max_tokens") is not None or body.get("max_completion_tokens") is not None:
        return body
    return body | {"max_tokens": default}
