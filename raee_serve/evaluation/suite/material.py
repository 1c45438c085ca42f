"""What the studies are made from: an exit table's rows, and test rows probed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from raee_serve.checkpoints import local_checkpoint
from raee_serve.errors import TaskError
from raee_serve.evaluation.probed import KnownVectors, ProbeCache, ProbedTask
from raee_serve.evaluation.run import shuffled_rows
from raee_serve.fingerprint import BackboneIdentity, identify_backbone
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.shortcuts import stored_shortcuts
from raee_serve.table.datasets import Example
from raee_serve.table.key_texts import key_texts
from raee_serve.table.schema import TableMetadata, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.table.task import Task
from raee_serve.table.tasks import get_task


@dataclass(frozen=True)
class Source:
    """Where the studies' rows come from.

    model, table: backbone and exit table; data: root of the data sets; scratch: a folder for
    tables that live as long as a study. limit: test rows a task; seed: of their shuffle, and of
    every other draw. served, documents: prompts of a label-word task, and documents to summarise,
    of which speed is measured on servers; 0: none.
    """

    model: str
    table: str
    data: str
    limit: int | None
    seed: int
    scratch: Path
    served: int = 0
    documents: int = 0


@dataclass
class Material:
    """A table's label-word tasks, and the test rows that are asked of each.

    summaries: the tasks among those asked for whose answers are free text.

    Decisions are made by the server's own retriever, over the table or over parts of its rows.
    """

    source: Source
    tasks: tuple[Task, ...]
    summaries: tuple[Task, ...]
    table: ExitTable
    checkpoint: Path
    backbone: BackboneIdentity
    _probes: ProbeCache
    _rows: dict[str, TaskRows] = field(default_factory=dict)
    _asked: dict[str, ProbedTask] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source, names: Sequence[str], probes_root: Path | None = None) -> Material:
        """names: of tasks, all of the table by default. probes_root: where probed test rows are
        kept, by default with all others.

        Raises RaeeError for a table of another backbone, and for tasks that are not in it or of
        which none has label words.
        """
        table = ExitTable.open(source.table)
        checkpoint = local_checkpoint(source.model)
        backbone = identify_backbone(checkpoint)
        table.metadata.check_backbone(backbone, source.table)
        tasks = [get_task(name) for name in names or table.metadata.tasks]
        with_labels = tuple(task for task in tasks if task.kind == "labels")
        summaries = tuple(task for task in tasks if task.kind == "free-text")
        absent = [task.name for task in tasks if task.name not in table.metadata.tasks]
        if absent or not with_labels:
            raise TaskError(
                f"tasks {absent or [t.name for t in tasks]} are not label-word tasks of "
                f"{source.table}, which holds {', '.join(table.metadata.tasks)}"
            )
        encoder = table.metadata.encoder
        probes = ProbeCache(checkpoint, backbone, encoder, encoder.name, probes_root)
        return cls(source, with_labels, summaries, table, checkpoint, backbone, probes)

    def rows(self, task: Task) -> TaskRows:
        """The table's rows of a task."""
        if task.name not in self._rows:
            self._rows[task.name] = self.table.rows(task.name)
        return self._rows[task.name]

    def some_rows(self, task: Task, most: int) -> TaskRows:
        """Up to that many of them, drawn once for all studies; a larger draw has a smaller one's
        rows, too."""
        rows = self.rows(task)
        order = np.random.default_rng(self.source.seed).permutation(len(rows))
        return rows.at(np.sort(order[:most]))

    def texts(self, task: Task, rows: TaskRows) -> list[str]:
        """Of rows of the table. Raises TaskError unless they or the data hold all of them."""
        return key_texts(task, rows, self.source.data)

    def asked(self, task: Task) -> ProbedTask:
        """Test rows of a task, also of one that the table does not hold."""
        if task.name not in self._asked:
            source = self.source
            examples = shuffled_rows(task, source.data, source.limit, source.seed)
            self._asked[task.name] = self._probes.of(task, examples)
        return self._asked[task.name]

    def probed(self, task: Task, texts: Sequence[str], like: ProbedTask) -> ProbedTask:
        """Other texts in the place of those of `like`, with the same gold answers."""
        pairs = zip(texts, like.golds.tolist(), strict=True)
        return self._probes.of(task, [Example(text, gold) for text, gold in pairs])

    def retriever(
        self,
        rows: Mapping[str, TaskRows] | None = None,
        prompts: Sequence[ProbedTask] = (),
        **options: Any,
    ) -> ExitRetriever:
        """Over the table, or over a table of these rows alone.

        prompts: to be asked of it; by default those of all tasks. options: of `ExitRetriever.open`.
        """
        table = self.table if rows is None else self.table_of(rows)
        return self.retriever_of(table, prompts, **options)

    def retriever_of(
        self, table: ExitTable, prompts: Sequence[ProbedTask] = (), **options: Any
    ) -> ExitRetriever:
        prompts = prompts or [self.asked(task) for task in self.tasks]
        options["encoder"] = KnownVectors(self.table.metadata.encoder, prompts)
        options["shortcuts"] = stored_shortcuts(self.table.uri, None, self.backbone)
        return ExitRetriever.open(table.uri, backbone=self.backbone, **options)

    def table_of(self, rows: Mapping[str, TaskRows]) -> ExitTable:
        """A table of these rows, in the scratch folder."""
        uri = str(Path(mkdtemp(dir=self.source.scratch)) / "table")
        metadata = TableMetadata(self.backbone, self.table.metadata.encoder)
        table = ExitTable.open_or_create(uri, metadata)
        for name, own in rows.items():
            table.put_task(self.table.metadata.tasks[name])
            table.add(name, own)
        return table
