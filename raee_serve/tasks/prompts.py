"""Prompt templates: render a text into a prompt, and recognise a prompt to get its text back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raee_serve.errors import TaskError

SLOT = "{text}"
ROLES = ("system", "user", "assistant")

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
    """Messages with one `{text}` slot among them, sent to /v1/chat/completions.

    template: the last message, which is the user's. earlier: (role, content) of the messages before
    it; a system message stands in front.
    """

    template: str
    earlier: tuple[tuple[str, str], ...] = ()
    label_prefix = ""  # a label word opens the assistant's turn as "great"

    def __post_init__(self) -> None:
        _check_template(*(content for _, content in self.messages))
        for place, (role, _) in enumerate(self.messages):
            if role not in ROLES or (role == "system" and place):
                raise TaskError(
                    f"role {role!r} of message {place + 1} of a prompt; allowed: system for the "
                    "first message, user, assistant"
                )

    @property
    def messages(self) -> tuple[tuple[str, str], ...]:
        return (*self.earlier, ("user", self.template))

    def render(self, text: str) -> list[dict[str, str]]:
        return [
            {"role": role, "content": content.replace(SLOT, text)}
            for role, content in self.messages
        ]

    def match(self, prompt: str | Sequence[Message]) -> str | None:
        """The text that fills the slot of a conversation like this one; else None.

        System messages count only where the template has one of its own.
        """
        if isinstance(prompt, str):
            return None
        sent, fill = list(prompt), None
        while sent and self.messages[0][0] != "system" and sent[0].get("role") == "system":
            del sent[0]
        if [message.get("role") for message in sent] != [role for role, _ in self.messages]:
            return None
        for message, (_, template) in zip(sent, self.messages, strict=True):
            content = _content_text(message.get("content"))
            if SLOT in template:
                fill = None if content is None else _fill_of(template, content)
            elif content != template:
                return None
        return fill


Prompt = CompletionPrompt | ChatPrompt


def described_prompt(prompt: Prompt) -> tuple[str, str]:
    """("completion" or "chat", template), or ("messages", JSON of several); see `prompt_of`."""
    if isinstance(prompt, CompletionPrompt):
        return "completion", prompt.template
    if not prompt.earlier:
        return "chat", prompt.template
    return "messages", json.dumps(prompt.messages)


def prompt_of(kind: str, template: str) -> Prompt:
    """The prompt that `described_prompt` described. Raises TaskError for anything else."""
    if kind == "completion":
        return CompletionPrompt(template)
    if kind == "chat":
        return ChatPrompt(template)
    if kind != "messages":
        raise TaskError(f"prompt kind {kind!r}; allowed: completion, chat, messages")
    try:
        return chat_prompt([(role, content) for role, content in json.loads(template)])
    except (ValueError, TypeError) as e:
        raise TaskError(f"prompt messages {template[:80]!r} cannot be read: {e}") from e


def chat_prompt(messages: Sequence[tuple[str, str]]) -> ChatPrompt:
    """The chat prompt of (role, content) messages. Raises TaskError for ones that make none."""
    if not messages or messages[-1][0] != "user":
        raise TaskError("the last message of a prompt must have the role user")
    return ChatPrompt(messages[-1][1], tuple(messages[:-1]))


def _check_template(*templates: str) -> None:
    if sum(template.count(SLOT) for template in templates) != 1:
        whole = templates[0] if len(templates) == 1 else " / ".join(templates)
        raise TaskError(f"prompt template {whole[:200]!r} must hold {SLOT} exactly once")


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
