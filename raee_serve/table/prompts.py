"""Prompt templates: render a text into a prompt, and recognise a prompt to get its text back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raee_serve.errors import TaskError

SLOT = "{text}"

Message = Mapping[str, Any]
"""One chat message, as in the OpenAI API: {"role", "content"}."""

Rendered = str | list[dict[str, str]]
"""A rendered prompt: completion text, or chat messages."""


@dataclass(frozen=True, slots=True)
class CompletionPrompt:
    """Text around one `{text}` slot, sent to /v1/completions."""

    template: str
    label_prefix = " "  # a label word continues the prompt as " great"

    def __post_init__(self) -> None:
        _check_template(self.template)

    def render(self, text: str) -> str:
        return self.template.replace(SLOT, text)

    def match(self, prompt: str | Sequence[Message]) -> str | None:
        """The text this prompt was rendered from, stripped; None if it was not."""
        return _fill_of(self.template, prompt) if isinstance(prompt, str) else None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """One user message with a `{text}` slot, sent to /v1/chat/completions."""

    template: str
    label_prefix = ""  # a label word opens the assistant's turn as "great"

    def __post_init__(self) -> None:
        _check_template(self.template)

    def render(self, text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.template.replace(SLOT, text)}]

    def match(self, prompt: str | Sequence[Message]) -> str | None:
        """The text of a conversation of one user message, system messages aside; else None."""
        if isinstance(prompt, str) or not prompt:
            return None
        *earlier, last = prompt
        if last.get("role") != "user" or any(m.get("role") != "system" for m in earlier):
            return None
        content = _content_text(last.get("content"))
        return None if content is None else _fill_of(self.template, content)


Prompt = CompletionPrompt | ChatPrompt


def described_prompt(prompt: Prompt) -> tuple[str, str]:
    """("completion" or "chat", template), which `prompt_of` takes."""
    return ("chat" if isinstance(prompt, ChatPrompt) else "completion"), prompt.template


def prompt_of(kind: str, template: str) -> Prompt:
    """Raises TaskError for another kind than these two, or a template without its slot."""
    kinds: dict[str, type[Prompt]] = {"chat": ChatPrompt, "completion": CompletionPrompt}
    if kind not in kinds:
        raise TaskError(f"prompt kind {kind!r}; allowed: {', '.join(kinds)}")
    return kinds[kind](template)


def _check_template(template: str) -> None:
    if template.count(SLOT) != 1:
        raise TaskError(f"prompt template {template!r} must hold {SLOT} exactly once")


def _fill_of(template: str, prompt: str) -> str | None:
    """What stands in the slot of an exactly matching prompt, stripped; None if nothing does."""
    head, tail = template.split(SLOT)
    if not (prompt.startswith(head) and prompt.endswith(tail)):
        return None
    # A prompt shorter than head and tail together gives a negative end and thus no text.
    return prompt[len(head) : max(len(prompt) - len(tail), 0)].strip() or None


def _content_text(content: object) -> str | None:
    """The text of a message's content, a string or a list of text parts; None for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return None
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type") != "text":
            return None
        texts.append(text)
    return "\n".join(texts)
