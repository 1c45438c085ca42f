"""A task: a prompt template with labels, or with free text as its answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raee_serve.errors import TaskError
from raee_serve.tasks.data_files import brief
from raee_serve.tasks.data_source import DataSource
from raee_serve.tasks.prompts import Message, Prompt, Rendered, described_prompt

Kind = Literal["labels", "free-text"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Task:
    """What is asked of the backbone about a text.

    labels: answers, strings of any length, in the order of the label indices; empty for free text.
    data: where its rows are, None of a task that comes from a table. hub: where they are instead
    for `--data hub`.
    """

    name: str
    prompt: Prompt
    labels: tuple[str, ...] = ()
    data: DataSource | None = None
    hub: DataSource | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise TaskError(
                f"task name {self.name!r}; allowed: letters, digits, '_' and '-', 64 at most"
            )
        if len(self.labels) == 1 or len(set(self.labels)) != len(self.labels):
            raise TaskError(
                f"task {self.name}: labels {brief(self.labels)} must be two or more different "
                "texts, or none for free text"
            )
        for label in self.labels:
            if not label or label != label.strip():
                raise TaskError(
                    f"task {self.name}: label {brief(label)} is not allowed: blank, or with space "
                    "around it"
                )

    @property
    def kind(self) -> Kind:
        return "labels" if self.labels else "free-text"

    @property
    def version(self) -> str:
        """Short hash of everything that shapes a prompt and its answers; binds tables (12 hex)."""
        kind, template = described_prompt(self.prompt)
        shape = [f"{kind.capitalize()}Prompt", template, list(self.labels)]
        return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:12]

    def render(self, text: str) -> Rendered:
        """The prompt a client sends about `text`: completion text or chat messages."""
        return self.prompt.render(text)

    def match(self, prompt: str | Sequence[Message]) -> str | None:
        """The text that `prompt` asks this task's question about, stripped; else None.

        That text, not the prompt, is the key that is embedded.
        """
        return self.prompt.match(prompt)

    def label_texts(self) -> tuple[str, ...]:
        """The labels as they appear in the output, after completion text with a space."""
        return tuple(map(self.answer_text, self.labels))

    def answer_text(self, answer: str) -> str:
        """An answer as it continues the rendered prompt."""
        return self.prompt.label_prefix + answer

    def plain_token_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """The first token of each label as it continues a prompt; empty if labels share one.

        The plain head tells labels apart by these tokens; probes do not need them. Raises
        TaskError if a label merges into the prompt's end.
        """
        prompt = prompt_text(tokenizer, self.render("a text"))
        ids = tuple(answer_token_ids(tokenizer, prompt, text)[0] for text in self.label_texts())
        return ids if len(set(ids)) == len(ids) else ()


def prompt_text(tokenizer: Any, rendered: Rendered) -> str:
    """The text the server's tokenizer sees: completions as they are, chats through the template.

    Raises TaskError for chat messages when the tokenizer has no chat template.
    """
    if isinstance(rendered, str):
        return rendered
    if not tokenizer.chat_template:
        raise TaskError("this backbone's tokenizer has no chat template, which chat prompts need")
    text = tokenizer.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def prompt_token_ids(tokenizer: Any, rendered: Rendered) -> list[int]:
    """Token ids as vLLM's OpenAI server makes them: special tokens (<bos>) added to completions
    by the tokenizer, and to chats by their template alone."""
    text = prompt_text(tokenizer, rendered)
    return list(tokenizer(text, add_special_tokens=isinstance(rendered, str))["input_ids"])


def answer_token_ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """The tokens that `answer` adds to `prompt`; TaskError if it changes the prompt's own."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    if len(after) <= len(before) or after[: len(before)] != before:
        raise TaskError(
            f"answer {answer[:40]!r} merges into the end of the prompt {prompt[-40:]!r}; "
            "choose a template that ends at a token boundary"
        )
    return list(after[len(before) :])
