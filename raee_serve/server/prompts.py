"""The prompts of a request body, one entry per prompt that the engine will run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from raee_serve.tasks.prompts import SLOT, ChatPrompt, CompletionPrompt, Message

Kind = Literal["completions", "chat"]

TokenIds = tuple[int, ...]

RawPrompt = str | TokenIds | Sequence[Message] | None
"""As it came: text, token ids, chat messages; None for embeddings, which have no text."""

TextPrompt = str | Sequence[Message] | None
"""As a task's template can match it; None where there is no text to match."""

# Fields that change how a prompt is rendered, and the value at which they do not. Rows of the
# table were rendered without them, so a prompt rendered otherwise is not recognised.
_PLAIN_RENDERING: dict[Kind, dict[str, Any]] = {
    "completions": {"add_special_tokens": True, "truncate_prompt_tokens": None, "suffix": None},
    "chat": {
        "add_generation_prompt": True,
        "add_special_tokens": False,
        "chat_template": None,
        "chat_template_kwargs": None,
        "continue_final_message": False,
        "documents": None,
        "tools": None,
        "truncate_prompt_tokens": None,
    },
}


def read_prompts(kind: Kind, body: dict[str, Any]) -> list[RawPrompt] | None:
    """The prompts in the order in which vLLM runs them; None if it would refuse the body.

    A body with `prompt_embeds` gives a single None: all its prompts are decided alike.
    """
    if kind == "chat":
        messages = body.get("messages")
        return [messages] if _is_conversation(messages) else None
    if body.get("prompt_embeds") is not None:
        return [None]
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        return None
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if _is_token_ids(prompt):
        return [tuple(prompt)]
    if all(_is_token_ids(item) for item in prompt):
        return [tuple(item) for item in prompt]
    return None


def is_rendered_plainly(kind: Kind, body: dict[str, Any]) -> bool:
    """Whether the body leaves prompt rendering as it was when the table was built."""
    return all(
        body.get(field) in (plain, None, [], {}) for field, plain in _PLAIN_RENDERING[kind].items()
    )


def scores_prompt(body: dict[str, Any]) -> bool:
    """Whether the body asks for log-probabilities of its prompts, or for nothing but them."""
    if body.get("prompt_logprobs") is not None:
        return True
    logprobs = body.get("logprobs")
    is_scored = logprobs is not None and logprobs is not False
    return bool(body.get("echo")) and (is_scored or body.get("max_tokens") == 0)


def whole_text(prompt: TextPrompt) -> str | None:
    """A prompt as one text, stripped: a completion's text, or a conversation's only user message.

    None for an empty prompt, or a conversation of several turns.
    """
    if prompt is None:
        return None
    template = CompletionPrompt(SLOT) if isinstance(prompt, str) else ChatPrompt(SLOT)
    return template.match(prompt)


def is_text(value: str) -> bool:
    """Whether a string can be encoded: JSON may carry half a surrogate pair, which cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) for message in messages)
    )


def _is_token_ids(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(token, int) and not isinstance(token, bool) and token >= 0
            for token in prompt
        )
    )
