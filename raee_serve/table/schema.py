"""What an exit table holds: the columns of its rows, and the metadata that binds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raee_serve.errors import BindingError
from raee_serve.exits.choice import Choice
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.shortcuts import Shortcuts
from raee_serve.tasks.prompts import described_prompt, prompt_of
from raee_serve.tasks.task import Kind, Task

FORMAT = 3
"""Raised whenever rows or metadata change in a way older readers would misread."""
METRIC = "cosine"
NAMED_LABELS = 6
REMEDY = "replace its rows (build --replace) or drop the task (table drop)"


def row_schema(dimension: int) -> pa.Schema:
    """Columns of an exit table; which of the nullable ones are filled depends on the kind."""
    floats = pa.list_(pa.float32())
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("task", pa.string(), nullable=False),  # TaskEntry.shelf
            pa.field("vector", pa.list_(pa.float32(), dimension), nullable=False),
            pa.field("gold", pa.int32()),  # label index
            pa.field("plain_probs", floats),  # labels: per layer, by the plain head
            pa.field("full_logprobs", floats),  # labels: per label, full depth's plain head
            pa.field("agreement", floats),  # free text: per probed exit
            pa.field("reference_hits", floats),  # free text: per probed exit
            pa.field("text", pa.string()),  # the key text, if asked for; of records their JSON
            pa.field("blob", pa.large_binary()),  # of records that hold a fit
        ]
    )


def row_id(task: str, text: str, gold: int | str) -> str:
    """The same for the same example in every run, so a build can be resumed (32 hex)."""
    return hashlib.sha256(json.dumps([task, text, gold]).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class TaskRows:
    """Rows of one task, as arrays. Label tasks fill the first group, free text the second.

    ids: n row ids
    vectors: [n, dimension] float32, L2-normalised
    golds: [n] int32, label indices
    plain_probs: [n, num_layers] float32, probability of the gold label by the plain head where it
        gives that label, else 0; None where the plain head cannot tell the labels apart
    full_logprobs: [n, num_labels] float32, log-probabilities of the labels by full depth's plain
        head; None likewise
    states: [n, layers, hidden_size] float16, after the final norm, at the task's layers; rows that
        were read have none, see `table.states`
    agreement: [n, num_exits] float32 within 0..1, share of positions where the exit's most
        probable token is full depth's
    reference_hits: [n, num_exits] float32 within 0..1, share of positions where it is the
        reference's
    Exits are the task's `layers` with the plain head, then its `shortcut_layers`.
    texts: key texts, or None if they are not kept
    """

    ids: list[str]
    vectors: NDArray[np.float32]
    golds: NDArray[np.int32] | None = None
    plain_probs: NDArray[np.float32] | None = None
    full_logprobs: NDArray[np.float32] | None = None
    states: NDArray[np.float16] | None = None
    agreement: NDArray[np.float32] | None = None
    reference_hits: NDArray[np.float32] | None = None
    texts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, places: Sequence[int] | NDArray[np.int64]) -> TaskRows:
        """The rows at these places, in their order."""
        taken: dict[str, Any] = {}
        for column in fields(self):
            values = getattr(self, column.name)
            if values is not None:
                is_list = isinstance(values, list)
                taken[column.name] = [values[i] for i in places] if is_list else values[places]
        return TaskRows(**taken)


@dataclass(frozen=True, slots=True)
class EncoderIdentity:
    """name: as `resolve_encoder` takes it; dimension: of its vectors; weights: fingerprint."""

    name: str
    dimension: int
    weights: str

    def __str__(self) -> str:
        return f"{self.name} ({self.dimension} dimensions, weights {self.weights[:12]})"

    def same_as(self, other: EncoderIdentity) -> bool:
        """Names may differ: the same encoder may be kept in different places."""
        return (self.dimension, self.weights) == (other.dimension, other.weights)


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """What the table records about one of its tasks: enough to serve it.

    prompt: "completion" or "chat", and the template. version: Task.version at build time.
    plain_token_ids: see `Task.plain_token_ids`.
    layers: the probed ones, ascending, full depth last.
    shortcut_layers: those at which free text was probed through a shortcut too, ascending;
        shortcuts: the digest of these shortcuts, empty without any.
    shelf: what stands in the `task` column of its rows; the table gives it. Replaced rows go to a
        new shelf, and no reader sees them before the entry names it.
    """

    name: str
    prompt: tuple[str, str]
    version: str
    labels: tuple[str, ...]
    plain_token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    shelf: str = field(default="", compare=False)
    shortcut_layers: tuple[int, ...] = ()
    shortcuts: str = ""

    @classmethod
    def of(
        cls,
        task: Task,
        plain_token_ids: tuple[int, ...],
        layers: tuple[int, ...],
        shortcuts: Shortcuts | None = None,
    ) -> TaskEntry:
        short = ((), "") if shortcuts is None else (shortcuts.layers, shortcuts.digest)
        return cls(
            task.name,
            described_prompt(task.prompt),
            task.version,
            task.labels,
            plain_token_ids,
            layers,
            shortcut_layers=short[0],
            shortcuts=short[1],
        )

    @property
    def task(self) -> Task:
        """The task itself, without its data."""
        return Task(self.name, prompt_of(*self.prompt), self.labels)

    @property
    def kind(self) -> Kind:
        return "labels" if self.labels else "free-text"

    @property
    def num_exits(self) -> int:
        """That free text was probed at."""
        return len(self.layers) + len(self.shortcut_layers)

    def on_shelf(self, number: int) -> TaskEntry:
        """A copy whose rows go to the shelf of that number; entries that differ share none."""
        shape = [self.version, self.labels, self.plain_token_ids, self.layers]
        shape += [self.shortcuts] if self.shortcuts else []
        digest = hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:12]
        return replace(self, shelf=f"{self.name}/{digest}/{number}")


@dataclass(frozen=True, slots=True)
class Built:
    """What the last finished build made of a task's rows; before that nobody reads them.

    rows: how many it had. no_fit: why these rows have no probes; empty where they have.
    """

    rows: int
    no_fit: str = ""


@dataclass(frozen=True, slots=True)
class TableMetadata:
    """The binding of a table: one backbone, one encoder, a template version per task.

    choices: what `raee-serve calibrate` stored, by task. built: of the tasks that are complete.
    """

    backbone: BackboneIdentity
    encoder: EncoderIdentity
    tasks: Mapping[str, TaskEntry] = field(default_factory=dict)
    choices: Mapping[str, Choice] = field(default_factory=dict)
    built: Mapping[str, Built] = field(default_factory=dict)
    metric: str = METRIC
    format: int = FORMAT

    def check_same(self, entry: TaskEntry, where: str) -> None:
        """Raises BindingError if the table holds the task with rows that were built otherwise."""
        known = self.tasks.get(entry.name)
        if known is not None and known != entry:
            raise BindingError(
                f"exit table {where} holds task {entry.name} as {_described(known)}, not as "
                f"{_described(entry)}; {REMEDY}"
            )

    def check_backbone(self, backbone: BackboneIdentity, where: str) -> None:
        """Raises BindingError naming both backbones unless they are the same."""
        if backbone != self.backbone:
            raise BindingError(
                f"exit table {where} was built for backbone {self.backbone}, not for {backbone}"
            )

    def check_encoder(self, encoder: EncoderIdentity, where: str) -> None:
        """Raises BindingError naming both encoders unless they are the same."""
        if not self.encoder.same_as(encoder):
            raise BindingError(
                f"exit table {where} was built with encoder {self.encoder}, not with {encoder}"
            )

    def check_shortcuts(self, shortcuts: Shortcuts | None, where: str) -> None:
        """Raises BindingError naming both sides if rows were probed through other shortcuts."""
        for entry in self.tasks.values():
            if entry.shortcuts and (shortcuts is None or shortcuts.digest != entry.shortcuts):
                raise BindingError(
                    f"exit table {where}: rows of {entry.name} were probed through shortcuts "
                    f"{entry.shortcuts} at layers {entry.shortcut_layers}, not through "
                    f"{shortcuts.digest if shortcuts else 'none'}; {REMEDY}, or name the file "
                    "(--shortcuts-file)"
                )

    def check_task(self, task: Task, where: str) -> None:
        """Raises BindingError naming both template versions if it holds the task under another."""
        entry = self.tasks.get(task.name)
        if entry is not None and entry.version != task.version:
            raise BindingError(
                f"exit table {where} holds task {task.name} with prompt template version "
                f"{entry.version} (labels {shortened(entry.labels)}), not {task.version} "
                f"(labels {shortened(task.labels)}); {REMEDY}"
            )


def shortened(labels: Sequence[str]) -> str:
    """For a message: the labels, or of many the first few and their number."""
    first = ", ".join(labels[:NAMED_LABELS])
    return (
        first if len(labels) <= NAMED_LABELS else f"{first} and {len(labels) - NAMED_LABELS} more"
    )


def _described(entry: TaskEntry) -> str:
    at = f" at {entry.shortcut_layers}" if entry.shortcuts else ""
    return (
        f"template version {entry.version}, labels {shortened(entry.labels)}, layers "
        f"{entry.layers}, shortcuts {entry.shortcuts or 'none'}{at}"
    )
