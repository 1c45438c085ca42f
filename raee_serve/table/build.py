"""Builds a task's rows: prompts through the backbone's layers, key texts through the encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from raee_serve.errors import TaskError
from raee_serve.retrieval.encoder import Encoder
from raee_serve.table.datasets import Example
from raee_serve.table.probe import LayerProbe
from raee_serve.table.schema import TaskEntry, TaskRows, row_id
from raee_serve.table.store import ExitTable
from raee_serve.table.task import Task, answer_token_ids, prompt_text, prompt_token_ids

DEFAULT_BATCH_TOKENS = 1024
"""Padded tokens of a batch. On CPUs larger batches gain nothing and spill out of the caches."""
BATCHES_PER_COMMIT = 8
"""Most work an interrupt loses."""
MAX_REFERENCE_TOKENS = 128
"""Longer references, or ones beyond half the backbone's limit, count by their beginning."""
FREE_TEXT_DEPTHS = (0.5, 0.625, 0.75, 0.875)
"""Shares of the depth at which free text is probed, besides the last layer but one and full depth:
each costs the whole LM head at every reference position, and shallower ones agree with nothing."""
OVERHEAD_BATCHES = 2
"""Batches on which the probe is timed against the bare forward pass."""


@dataclass(frozen=True, slots=True)
class Item:
    """One example, tokenised. reference: token ids, empty for label tasks."""

    id: str
    example: Example
    prompt: list[int]
    reference: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.reference)


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What building one task did.

    added: new rows; kept: rows that were there before; truncated: prompts cut to the model's limit.
    replaced: rows that made way for these, None if none were to.
    overhead: (probe - bare forward) / bare forward on sample batches, None if nothing was added.
    """

    task: str
    added: int
    kept: int
    truncated: int
    seconds: float
    overhead: float | None
    replaced: int | None = None

    def __str__(self) -> str:
        rate = self.added / self.seconds if self.seconds else 0.0
        line = f"{self.task}: {self.added} rows added, {self.kept} kept, {rate:.1f} rows/s"
        if self.replaced is not None:
            line += f", in place of {self.replaced}"
        if self.overhead is not None:
            line += f", probe overhead {self.overhead:+.1%}"
        if self.truncated:
            line += f", {self.truncated} prompts truncated"
        return line


class TaskBuilder:
    """Adds the rows of one task to a table; rows that are there already are not computed again."""

    def __init__(
        self,
        task: Task,
        table: ExitTable,
        probe: LayerProbe,
        encoder: Encoder,
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        store_text: bool = False,
        replace: bool = False,
    ) -> None:
        """replace: what the table holds of the task makes way for what is built, at its end."""
        self.task = task
        self._table = table
        self._probe = probe
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._store_text = store_text
        self._replace = replace
        self._label_ids = task.label_token_ids(probe.tokenizer)
        depth = probe.num_layers
        self._layers = tuple(range(1, depth + 1)) if self._label_ids else free_text_layers(depth)
        self._truncated = 0

    def build(self, examples: Sequence[Example], *, progress: bool = True) -> BuildReport:
        """Probes, embeds and stores `examples`; what is done when interrupted stays done.

        Raises BindingError if the table holds the task under another template, unless it is to be
        replaced.
        """
        entry = TaskEntry.of(self.task, self._label_ids, self._layers)
        before = self._begin(entry)
        known = self._table.row_ids(self.task.name)
        by_id = {row_id(self.task.name, e.text, e.gold): e for e in examples}
        items = [self._tokenise(id, e) for id, e in by_id.items() if id not in known]
        items.sort(key=lambda item: item.length, reverse=True)
        batches = list(length_batches(items, self._batch_tokens))
        start = time.perf_counter()
        with tqdm(total=len(items), desc=self.task.name, unit="row", disable=not progress) as bar:
            for first in range(0, len(batches), BATCHES_PER_COMMIT):
                group = batches[first : first + BATCHES_PER_COMMIT]
                self._table.add(self.task.name, self._rows(group, bar))
        seconds = time.perf_counter() - start
        if self._replace:
            self._table.finish_replace(self.task.name, by_id)
        return BuildReport(
            self.task.name,
            added=len(items),
            kept=len(by_id) - len(items),
            truncated=self._truncated,
            seconds=seconds,
            overhead=self._overhead(batches) if batches and self._label_ids else None,
            replaced=before if self._replace else None,
        )

    def _begin(self, entry: TaskEntry) -> int:
        """The number of rows that the table holds of the task."""
        held = entry.name in self._table.metadata.tasks
        before = len(self._table.row_ids(entry.name)) if held else 0
        if self._replace:
            self._table.begin_replace(entry)
        else:
            self._table.put_task(entry)
        return before

    def _tokenise(self, id: str, example: Example) -> Item:
        """The example as the server will see it, its document cut short where it must be."""
        tokenizer = self._probe.tokenizer
        text = example.text
        prompt = prompt_token_ids(tokenizer, self.task.render(text))
        reference = self._reference(text, example.gold) if isinstance(example.gold, str) else []
        if len(prompt) + len(reference) > self._probe.max_length:
            self._truncated += 1
        while (over := len(prompt) + len(reference) - self._probe.max_length) > 0:
            text = _without_last_tokens(tokenizer, text, over)
            if not text:
                raise TaskError(
                    f"task {self.task.name}: its template and reference alone exceed the "
                    f"backbone's {self._probe.max_length} tokens"
                )
            prompt = prompt_token_ids(tokenizer, self.task.render(text))
        return Item(id, example, prompt, reference)

    def _reference(self, text: str, reference: str) -> list[int]:
        tokenizer = self._probe.tokenizer
        prompt = prompt_text(tokenizer, self.task.render(text))
        ids = answer_token_ids(tokenizer, prompt, self.task.answer_text(reference))
        return ids[: min(MAX_REFERENCE_TOKENS, self._probe.max_length // 2)]

    def _rows(self, batches: Sequence[Sequence[Item]], bar: tqdm) -> TaskRows:
        """The finished rows of some batches, in order."""
        examples = [item.example for batch in batches for item in batch]
        texts = [example.text for example in examples]
        ids = [item.id for batch in batches for item in batch]
        vectors = self._encoder.encode(texts)
        scores = []
        for batch in batches:
            scores.append(self._scores(batch))
            bar.update(len(batch))
        columns = [np.concatenate(parts) for parts in zip(*scores, strict=True)]
        kept_texts = texts if self._store_text else None
        if self._label_ids:
            golds = np.array([example.gold for example in examples], np.int32)
            return TaskRows(ids, vectors, golds, label_logprobs=columns[0], texts=kept_texts)
        logprob, agreement = columns
        return TaskRows(
            ids, vectors, reference_logprob=logprob, agreement=agreement, texts=kept_texts
        )

    def _scores(self, batch: Sequence[Item]) -> tuple[NDArray[np.float32], ...]:
        """Label tasks: the label log-probabilities; free text: reference scores and agreement."""
        prompts = [item.prompt for item in batch]
        if self._label_ids:
            return (self._probe.label_logprobs(prompts, self._label_ids),)
        references = [item.reference for item in batch]
        return self._probe.reference_scores(prompts, references, self._layers)

    def _overhead(self, batches: Sequence[Sequence[Item]]) -> float:
        """(probe - bare forward) / bare forward: of either the better of two alternating runs."""
        middle = len(batches) // 2
        bare = probed = 0.0
        for batch in batches[middle : middle + OVERHEAD_BATCHES]:
            forward = partial(self._probe.bare_forward, [item.prompt for item in batch])
            probe = partial(self._scores, batch)
            times = [_seconds(work) for work in (forward, probe, probe, forward)]
            bare += min(times[0], times[3])
            probed += min(times[1], times[2])
        return (probed - bare) / bare


def free_text_layers(num_layers: int) -> tuple[int, ...]:
    """The layers at which free text is probed, ascending, full depth last."""
    shares = {round(share * num_layers) for share in FREE_TEXT_DEPTHS}
    return tuple(sorted({max(1, layer) for layer in shares | {num_layers - 1, num_layers}}))


def length_batches(items: Sequence[Item], budget: int) -> Iterator[list[Item]]:
    """Batches of items, which come longest first, of at most `budget` tokens when padded.

    An item longer than the budget is a batch of its own.
    """
    batch: list[Item] = []
    for item in items:
        longest = batch[0].length if batch else item.length
        assert item.length <= longest, "items must come longest first"
        if batch and longest * (len(batch) + 1) > budget:
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


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
