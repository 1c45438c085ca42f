"""Builds a task's rows: prompts through the backbone's layers, key texts through the encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from raee_serve.retrieval.encoder import Encoder
from raee_serve.table.datasets import Example
from raee_serve.table.probe import LayerProbe
from raee_serve.table.rows import Batch, ItemMaker, ReadsPrompts, RowMaker, length_batches
from raee_serve.table.schema import TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.table.task import Task

DEFAULT_BATCH_TOKENS = 1024
"""Padded tokens of a batch. On CPUs larger batches gain nothing and spill out of the caches."""
BATCHES_PER_COMMIT = 8
"""Most work an interrupt loses."""
OVERHEAD_BATCHES = 2
"""Batches on which the probe is timed against the bare forward pass."""


@dataclass(frozen=True, slots=True)
class TaskWork:
    """What is to be done for one task. groups: batches whose rows are committed together.

    ids: of all rows that are wanted; kept: how many of them are there already.
    replaced: rows that are to make way for these, None if none are.
    truncated: prompts cut to the model's limit.
    """

    entry: TaskEntry
    groups: list[list[Batch]]
    ids: frozenset[str]
    kept: int
    replaced: int | None

    @property
    def batches(self) -> list[Batch]:
        return [batch for group in self.groups for batch in group]

    @property
    def added(self) -> int:
        return sum(map(len, self.batches))

    @property
    def truncated(self) -> int:
        return sum(item.truncated for batch in self.batches for item in batch)


def plan_task(
    task: Task,
    table: ExitTable,
    backbone: ReadsPrompts,
    examples: Sequence[Example],
    batch_tokens: int,
    *,
    replace: bool = False,
) -> TaskWork:
    """The examples whose rows the table lacks, tokenised and in batches; records the task.

    replace: its rows are to take the place of those that the table holds, see `finish_task`.
    Raises BindingError if the table holds the task under another template, unless it is to be
    replaced.
    """
    maker = ItemMaker(task, backbone)
    before = len(table.row_ids(task.name)) if task.name in table.metadata.tasks else 0
    if replace:
        table.begin_replace(maker.entry)
    else:
        table.put_task(maker.entry)
    known = table.row_ids(task.name)
    by_id = {maker.id(example): example for example in examples}
    items = [maker.item(example) for id, example in by_id.items() if id not in known]
    batches = list(length_batches(items, batch_tokens))
    groups = [
        batches[first : first + BATCHES_PER_COMMIT]
        for first in range(0, len(batches), BATCHES_PER_COMMIT)
    ]
    kept, replaced = len(by_id) - len(items), before if replace else None
    return TaskWork(maker.entry, groups, frozenset(by_id), kept, replaced)


def finish_task(table: ExitTable, work: TaskWork) -> None:
    """After all its rows were added: rows that are to be replaced make way, in one commit."""
    if work.replaced is not None:
        table.finish_replace(work.entry.name, work.ids)


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

    def build(self, examples: Sequence[Example], *, progress: bool = True) -> BuildReport:
        """Probes, embeds and stores `examples`; what is done when interrupted stays done.

        Raises as `plan_task`.
        """
        work = plan_task(
            self.task, self._table, self._probe, examples, self._batch_tokens, replace=self._replace
        )
        maker = RowMaker(work.entry, self._store_text)
        start = time.perf_counter()
        with tqdm(total=work.added, desc=self.task.name, unit="row", disable=not progress) as bar:
            for group in work.groups:
                self._table.add(self.task.name, self._rows(maker, group, bar))
        seconds = time.perf_counter() - start
        finish_task(self._table, work)
        return BuildReport(
            self.task.name,
            added=work.added,
            kept=work.kept,
            truncated=work.truncated,
            seconds=seconds,
            overhead=self._overhead(maker, work.batches) if self.task.kind == "labels" else None,
            replaced=work.replaced,
        )

    def _rows(self, maker: RowMaker, group: Sequence[Batch], bar: tqdm) -> TaskRows:
        vectors = maker.vectors(self._encoder, group)
        scores = []
        for batch in group:
            scores.append(maker.scores(self._probe, batch))
            bar.update(len(batch))
        return maker.rows(group, vectors, scores)

    def _overhead(self, maker: RowMaker, batches: Sequence[Batch]) -> float | None:
        """(probe - bare forward) / bare forward: of either the better of two alternating runs."""
        if not batches:
            return None
        middle = len(batches) // 2
        bare = probed = 0.0
        for batch in batches[middle : middle + OVERHEAD_BATCHES]:
            forward = partial(self._probe.bare_forward, [item.prompt for item in batch])
            probe = partial(maker.scores, self._probe, batch)
            times = [_seconds(work) for work in (forward, probe, probe, forward)]
            bare += min(times[0], times[3])
            probed += min(times[1], times[2])
        return (probed - bare) / bare


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
