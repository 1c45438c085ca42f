"""What an exit table holds: the columns of its rows, and the metadata that binds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raee_serve.errors import BindingError, TableError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.table.task import Kind, Task

FORMAT = 1
"""Raised whenever rows or metadata change in a way older readers would misread."""
METRIC = "cosine"


def row_schema(dimension: int) -> pa.Schema:
    """Columns of the `exits` table; which of the nullable ones are filled depends on the kind."""
    floats = pa.list_(pa.float32())
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("task", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dimension), nullable=False),
            pa.field("gold", pa.int32()),  # label index
            pa.field("label_logprobs", floats),  # num_layers * num_labels, layer-major
            pa.field("reference_logprob", floats),  # free text: mean per probed layer
            pa.field("agreement", floats),  # free text: with full depth, per probed layer
            pa.field("text", pa.string()),  # the key text, if asked for
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
    label_logprobs: [n, num_layers, num_labels] float32, log-softmax over the label words
    reference_logprob: [n, len(layers)] float32, mean over the reference's tokens
    agreement: [n, len(layers)] float32 within 0..1, share of positions where the layer's most
        probable token is full depth's
    texts: key texts, or None if they are not kept
    """

    ids: list[str]
    vectors: NDArray[np.float32]
    golds: NDArray[np.int32] | None = None
    label_logprobs: NDArray[np.float32] | None = None
    reference_logprob: NDArray[np.float32] | None = None
    agreement: NDArray[np.float32] | None = None
    texts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)


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
    """What the table records about one of its tasks.

    version: Task.version at build time; layers: the probed ones, ascending, full depth last.
    """

    name: str
    version: str
    kind: Kind
    label_words: tuple[str, ...]
    label_token_ids: tuple[int, ...]
    layers: tuple[int, ...]

    @classmethod
    def of(cls, task: Task, label_token_ids: tuple[int, ...], layers: tuple[int, ...]) -> TaskEntry:
        return cls(task.name, task.version, task.kind, task.label_words, label_token_ids, layers)


@dataclass(frozen=True, slots=True)
class RuleChoice:
    """How exits of a task are chosen; see `retrieval.aggregate`. vote_weight: of fused exits."""

    rule: str
    k: int
    fraction: float
    vote_weight: float


@dataclass(frozen=True, slots=True)
class TableMetadata:
    """The binding of a table: one backbone, one encoder, a template version per task.

    choices: what `raee-serve calibrate` stored, by task.
    """

    backbone: BackboneIdentity
    encoder: EncoderIdentity
    tasks: Mapping[str, TaskEntry] = field(default_factory=dict)
    choices: Mapping[str, RuleChoice] = field(default_factory=dict)
    metric: str = METRIC
    format: int = FORMAT

    def with_task(self, entry: TaskEntry) -> TableMetadata:
        """A copy that also holds `entry`.

        Raises BindingError if the task's rows were built otherwise (template, labels, layers).
        """
        known = self.tasks.get(entry.name)
        if known is not None and known != entry:
            raise BindingError(
                f"task {entry.name} is in this table as {known}, which differs from {entry}"
            )
        return replace(self, tasks={**self.tasks, entry.name: entry})

    def with_choice(self, task: str, choice: RuleChoice) -> TableMetadata:
        """A copy that holds `choice` for one of its tasks."""
        assert task in self.tasks, f"{task} is not in {list(self.tasks)}"
        return replace(self, choices={**self.choices, task: choice})

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

    def check_task(self, task: Task, where: str) -> None:
        """Raises BindingError naming both template versions unless they are the same."""
        entry = self.tasks[task.name]
        if entry.version != task.version:
            raise BindingError(
                f"exit table {where} holds task {task.name} with prompt template version "
                f"{entry.version} (label words {entry.label_words}), not {task.version} "
                f"(label words {task.label_words}); rebuild it"
            )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TableMetadata:
        """Raises TableError if the text is not metadata of this format."""
        try:
            raw = json.loads(text)
            found = raw["format"], raw["metric"]
            if found != (FORMAT, METRIC):
                raise TableError(
                    f"format and metric are {found}, this version reads {(FORMAT, METRIC)}"
                )
            return cls(
                backbone=BackboneIdentity(**raw["backbone"]),
                encoder=EncoderIdentity(**raw["encoder"]),
                tasks={name: _task_entry(entry) for name, entry in raw["tasks"].items()},
                choices={n: RuleChoice(**choice) for n, choice in raw.get("choices", {}).items()},
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
            raise TableError(f"metadata cannot be read ({type(e).__name__}: {e})") from e


def _task_entry(raw: Mapping[str, Any]) -> TaskEntry:
    lists = ("label_words", "label_token_ids", "layers")
    fields: dict[str, Any] = {key: tuple(v) if key in lists else v for key, v in raw.items()}
    return TaskEntry(**fields)
