"""Builds a task's rows: prompts through the backbone's layers, key texts through the encoder."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from raee_serve.errors import TableError
from raee_serve.exits.fit import TaskFit, fit_task, why_not
from raee_serve.retrieval.encoder import Encoder
from raee_serve.table.probe import LayerProbe
from raee_serve.table.rows import (
    MOST_PROBES,
    Batch,
    ItemMaker,
    ReadsPrompts,
    RowMaker,
    length_batches,
)
from raee_serve.table.schema import Built, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import Example
from raee_serve.tasks.task import Task

DEFAULT_BATCH_TOKENS = 1024
"""Padded tokens of a batch. On CPUs larger batches gain nothing and spill out of the caches."""
BATCHES_PER_COMMIT = 8
"""Most work an interrupt loses."""


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
    probe_layers: int = MOST_PROBES,
) -> TaskWork:
    """The examples whose rows the table lacks, tokenised and in batches; records the task.

    replace: its rows are to take the place of those that the table holds, see `finish_task`.
    Raises BindingError if the table holds the task under another template, unless it is to be
    replaced.
    """
    maker = ItemMaker(task, backbone, probe_layers)
    before = len(table.row_ids(task.name)) if task.name in table.metadata.tasks else 0
    if replace:
        table.begin_replace(maker.entry)
    else:
        table.put_task(maker.entry)
    known = table.complete_ids(task.name)
    by_id = {maker.id(example): example for example in examples}
    items = [maker.item(example) for id, example in by_id.items() if id not in known]
    batches = list(length_batches(items, batch_tokens))
    groups = [
        batches[first : first + BATCHES_PER_COMMIT]
        for first in range(0, len(batches), BATCHES_PER_COMMIT)
    ]
    kept, replaced = len(by_id) - len(items), before if replace else None
    return TaskWork(maker.entry, groups, frozenset(by_id), kept, replaced)


def finish_task(table: ExitTable, work: TaskWork, *, progress: bool = True) -> Finished:
    """After all its rows were added: the fit to them and the task's completion, in one commit.

    Rows that are to be replaced make way in it.
    """
    replacing = None if work.replaced is None else work.ids
    return complete(table, work.entry.name, replacing, progress=progress)


def complete(
    table: ExitTable,
    task: str,
    replacing: Collection[str] | None = None,
    *,
    progress: bool = True,
) -> Finished:
    """Fits probes to all rows of a task as they are now, and records both.

    A task whose rows have a fit already, or that has no rows, is left as it is. Raises TableError
    if states are gone or not finite.
    """
    start = time.perf_counter()
    rows, entry = table.target_rows(task), table.entry(task)
    if replacing is not None:
        wanted = set(replacing)
        rows = rows.at([place for place, row_id in enumerate(rows.ids) if row_id in wanted])
    known = None if replacing is not None else table.fit(task)
    if known is not None and set(known.ids) == set(rows.ids):
        return Finished(0.0, "")
    no_fit, fit = "", None
    if entry.kind == "free-text":
        no_fit = "it is free text"
    else:
        assert rows.golds is not None
        no_fit = why_not(rows.golds, rows.ids) or ""
        if not no_fit:
            fit = _fit(table, entry, rows, progress)
    table.finish(task, Built(len(rows), no_fit), fit, replacing)
    return Finished(time.perf_counter() - start, no_fit if entry.kind == "labels" else "")


def _fit(table: ExitTable, entry: TaskEntry, rows: TaskRows, progress: bool) -> TaskFit:
    states = table.states(entry.name, rows.ids)
    assert rows.golds is not None
    with tqdm(entry.layers, desc=f"{entry.name} probes", unit="layer", disable=not progress) as bar:
        try:
            return fit_task(
                entry.layers,
                lambda layer: states[entry.layers.index(layer)],
                rows.vectors,
                rows.golds,
                rows.ids,
                len(entry.labels),
                lambda _layer: bar.update(),
            )
        except ValueError as e:
            raise TableError(f"task {entry.name}: no probes can be fitted: {e}") from e


@dataclass(frozen=True, slots=True)
class Finished:
    """seconds: of the fit. no_fit: why a label task has no probes; empty if it has."""

    seconds: float
    no_fit: str


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What building one task did.

    added: new rows; kept: rows that were there before; truncated: prompts cut to the model's limit.
    replaced: rows that made way for these, None if none were to.
    finished: of the fit to all rows.
    """

    task: str
    added: int
    kept: int
    truncated: int
    seconds: float
    finished: Finished
    replaced: int | None = None

    def __str__(self) -> str:
        rate = self.added / self.seconds if self.seconds else 0.0
        line = f"{self.task}: {self.added} rows added, {self.kept} kept, {rate:.1f} rows/s"
        if self.replaced is not None:
            line += f", in place of {self.replaced}"
        if self.finished.seconds >= 0.1:
            line += f", probes fitted in {self.finished.seconds:.1f} s"
        if self.finished.no_fit:
            line += f"; no probes: {self.finished.no_fit}, so the plain head answers"
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
        probe_layers: int = MOST_PROBES,
    ) -> None:
        """replace: what the table holds of the task makes way for what is built, at its end."""
        self.task = task
        self._table = table
        self._probe = probe
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._store_text = store_text
        self._replace = replace
        self._probe_layers = probe_layers

    def build(self, examples: Sequence[Example], *, progress: bool = True) -> BuildReport:
        """Probes, embeds and stores `examples`; what is done when interrupted stays done.

        Raises as `plan_task`.
        """
        work = plan_task(
            self.task,
            self._table,
            self._probe,
            examples,
            self._batch_tokens,
            replace=self._replace,
            probe_layers=self._probe_layers,
        )
        maker = RowMaker(work.entry, self._store_text)
        start = time.perf_counter()
        with tqdm(total=work.added, desc=self.task.name, unit="row", disable=not progress) as bar:
            for group in work.groups:
                self._table.add(self.task.name, self._rows(maker, group, bar))
        seconds = time.perf_counter() - start
        finished = finish_task(self._table, work, progress=progress)
        return BuildReport(
            self.task.name,
            added=work.added,
            kept=work.kept,
            truncated=work.truncated,
            seconds=seconds,
            finished=finished,
            replaced=work.replaced,
        )

    def _rows(self, maker: RowMaker, group: Sequence[Batch], bar: tqdm) -> TaskRows:
        vectors = maker.vectors(self._encoder, group)
        scores = []
        for batch in group:
            scores.append(maker.scores(self._probe, batch))
            bar.update(len(batch))
        return maker.rows(group, vectors, scores)
