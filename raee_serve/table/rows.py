"""The rows of one task: examples tokenised, put into batches, and turned into rows.

Nothing here knows a table, so any process that has the backbone or the encoder can do its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import TaskError
from raee_serve.exit_points import even_points
from raee_serve.retrieval.encoder import Encoder
from raee_serve.shortcuts import Shortcuts
from raee_serve.table.evidence import plain_evidence
from raee_serve.table.probe import LayerProbe
from raee_serve.table.schema import TaskEntry, TaskRows, row_id
from raee_serve.tasks.datasets import Example
from raee_serve.tasks.task import Task, answer_token_ids, prompt_text, prompt_token_ids

MAX_REFERENCE_TOKENS = 128
"""Longer references, or ones beyond half the backbone's limit, count by their beginning."""
MOST_PROBES = 32
"""Layers that get a probe unless more are asked for, at even distances in a deeper model."""
FREE_TEXT_DEPTHS = (0.5, 0.625, 0.75, 0.875)
"""Shares of the depth at which free text is probed, besides the last layer but one and full depth:
each costs the whole LM head at every reference position, and shallower ones agree with nothing."""


@dataclass(frozen=True, slots=True)
class Item:
    """One example, tokenised.

    reference: token ids, empty for label tasks. truncated: whether its text was cut short.
    """

    id: str
    example: Example
    prompt: list[int]
    reference: list[int]
    truncated: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.reference)


Batch = list[Item]
"""Items that go through the backbone together."""
Scores = tuple[NDArray[Any], ...]
"""Label tasks: states, and log-probabilities of the labels at every layer; free text: agreement
with full depth, and hits of the reference."""


class ReadsPrompts(Protocol):
    """What tokenising needs to know of a backbone; `LayerProbe` does.

    max_length: in tokens. shortcuts: through which free text is probed too, if any.
    """

    tokenizer: Any
    num_layers: int
    max_length: int
    shortcuts: Shortcuts | None


class ItemMaker:
    """Examples of one task as a backbone's server will see them."""

    def __init__(self, task: Task, backbone: ReadsPrompts, probe_layers: int = MOST_PROBES) -> None:
        """probe_layers: how many layers get a probe at most.

        Raises TaskError if a label merges into the prompt's end.
        """
        self._task = task
        self._backbone = backbone
        depth, is_labelled = backbone.num_layers, task.kind == "labels"
        self.entry = TaskEntry.of(
            task,
            task.plain_token_ids(backbone.tokenizer) if is_labelled else (),
            even_points(depth, probe_layers) if is_labelled else free_text_layers(depth),
            None if is_labelled else backbone.shortcuts,
        )

    def id(self, example: Example) -> str:
        return row_id(self._task.name, example.text, example.gold)

    def item(self, example: Example) -> Item:
        """The example, its document cut short where it must be. Raises TaskError if that fails."""
        tokenizer, limit = self._backbone.tokenizer, self._backbone.max_length
        text = example.text
        prompt = prompt_token_ids(tokenizer, self._task.render(text))
        reference = self._reference(text, example.gold) if isinstance(example.gold, str) else []
        while (over := len(prompt) + len(reference) - limit) > 0:
            text = _without_last_tokens(tokenizer, text, over)
            if not text:
                raise TaskError(
                    f"task {self._task.name}: its template and reference alone exceed the "
                    f"backbone's {limit} tokens"
                )
            prompt = prompt_token_ids(tokenizer, self._task.render(text))
        return Item(self.id(example), example, prompt, reference, text != example.text)

    def _reference(self, text: str, reference: str) -> list[int]:
        tokenizer = self._backbone.tokenizer
        prompt = prompt_text(tokenizer, self._task.render(text))
        ids = answer_token_ids(tokenizer, prompt, self._task.answer_text(reference))
        return ids[: min(MAX_REFERENCE_TOKENS, self._backbone.max_length // 2)]


@dataclass(frozen=True, slots=True)
class RowMaker:
    """Rows of a task out of batches of its items, in steps that need not share a process."""

    entry: TaskEntry
    store_text: bool = False

    def vectors(self, encoder: Encoder, batches: Sequence[Batch]) -> NDArray[np.float32]:
        """[items, dimension], in order."""
        return encoder.encode([item.example.text for batch in batches for item in batch])

    def scores(self, probe: LayerProbe, batch: Batch) -> Scores:
        """What the backbone's layers say about one batch: arrays of one row an item."""
        prompts = [item.prompt for item in batch]
        if self.entry.kind == "labels":
            return probe.label_states(prompts, self.entry.layers, self.entry.plain_token_ids)
        references = [item.reference for item in batch]
        return probe.reference_scores(prompts, references, self.entry.layers)

    def rows(
        self, batches: Sequence[Batch], vectors: NDArray[np.float32], scores: Sequence[Scores]
    ) -> TaskRows:
        """vectors: of all items; scores: of each batch."""
        items = [item for batch in batches for item in batch]
        ids, texts = [item.id for item in items], [item.example.text for item in items]
        first, second = (np.concatenate(parts) for parts in zip(*scores, strict=True))
        kept_texts = texts if self.store_text else None
        if self.entry.kind == "free-text":
            return TaskRows(ids, vectors, agreement=first, reference_hits=second, texts=kept_texts)
        golds = np.array([item.example.gold for item in items], np.int32)
        plain: dict[str, Any] = {}
        if self.entry.plain_token_ids:
            plain = {
                "plain_probs": plain_evidence(second, golds),
                "full_logprobs": second[:, -1],
            }
        return TaskRows(ids, vectors, golds, states=first, texts=kept_texts, **plain)


def free_text_layers(num_layers: int) -> tuple[int, ...]:
    """The layers at which free text is probed, ascending, full depth last."""
    shares = {round(share * num_layers) for share in FREE_TEXT_DEPTHS}
    return tuple(sorted({max(1, layer) for layer in shares | {num_layers - 1, num_layers}}))


def length_batches(items: Sequence[Item], budget: int) -> Iterator[Batch]:
    """Batches of items, longest items first, of at most `budget` tokens when padded.

    An item longer than the budget is a batch of its own.
    """
    batch: Batch = []
    for item in sorted(items, key=lambda item: item.length, reverse=True):
        if batch and batch[0].length * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _without_last_tokens(tokenizer: Any, text: str, count: int) -> str:
    """The text cut before its last `count` tokens; empty if it has no more than that."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return text[: starts[-count]].rstrip() if count < len(starts) else ""
