"""A task's test rows as backbone and encoder see them: computed once, kept in the cache folder.

They are kept as exit tables of their own, so that a larger --limit only adds what is missing. No
server ever reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from raee_serve.checkpoints import cache_dir
from raee_serve.errors import RaeeError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.retrieval.encoder import Encoder
from raee_serve.table.build import TaskBuilder
from raee_serve.table.datasets import Example
from raee_serve.table.probe import LayerProbe
from raee_serve.table.schema import EncoderIdentity, TableMetadata, TaskRows, row_id
from raee_serve.table.store import ExitTable
from raee_serve.table.task import Task


@dataclass(frozen=True, slots=True)
class ProbedTask:
    """Test rows of a label-word task, in the order asked for.

    texts: n; golds: [n]; vectors: [n, dimension]; label_logprobs: [n, num_layers, num_labels].
    """

    texts: list[str]
    golds: NDArray[np.int32]
    vectors: NDArray[np.float32]
    label_logprobs: NDArray[np.float32]


class ProbeCache:
    """Probes test rows, or finds them probed. The models are loaded only for rows that are new."""

    def __init__(
        self,
        checkpoint: Path,
        backbone: BackboneIdentity,
        encoder: EncoderIdentity,
        encoder_name: str,
        root: Path | None = None,
    ) -> None:
        """encoder: the table's; encoder_name: where it is found; root: where rows are kept, by
        default in the cache folder."""
        self._root = root or cache_dir() / "test-rows"
        self._checkpoint = checkpoint
        self._metadata = TableMetadata(backbone, encoder)
        self._encoder_name = encoder_name
        self._models: tuple[LayerProbe, Encoder] | None = None

    def of(self, task: Task, examples: Sequence[Example]) -> ProbedTask:
        """Raises BindingError if the encoder found is not the table's."""
        ids = [row_id(task.name, example.text, example.gold) for example in examples]
        table = ExitTable.open_or_create(str(self._folder(task)), self._metadata)
        known = table.row_ids(task.name) if task.name in table.metadata.tasks else set()
        if not set(ids) <= known:
            probe, encoder = self._loaded()
            TaskBuilder(task, table, probe, encoder).build(examples)
        return _in_order(table.rows(task.name), ids, [example.text for example in examples])

    def _folder(self, task: Task) -> Path:
        """One for everything that a row depends on, save its text and gold answer."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        key = [asdict(self._metadata.backbone), self._metadata.encoder.weights, task.version]
        digest = hashlib.sha256(json.dumps([*key, device]).encode()).hexdigest()[:16]
        return self._root / f"{task.name}-{digest}"

    def _loaded(self) -> tuple[LayerProbe, Encoder]:
        if self._models is None:
            encoder = Encoder(self._encoder_name, threads=torch.get_num_threads())
            self._metadata.check_encoder(encoder.identity(), "of the test rows")
            self._models = LayerProbe(self._checkpoint), encoder
        return self._models


class KnownVectors:
    """Stands in for an encoder whose vectors of some texts are known already."""

    def __init__(self, encoder: EncoderIdentity, tasks: Sequence[ProbedTask]) -> None:
        self._identity = encoder
        self.dimension = encoder.dimension
        self._vectors = {
            text: vector
            for task in tasks
            for text, vector in zip(task.texts, task.vectors, strict=True)
        }

    def identity(self) -> EncoderIdentity:
        return self._identity

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[len(texts), dimension]. Raises RaeeError for a text that is not known."""
        unknown = [text for text in texts if text not in self._vectors]
        if unknown:
            raise RaeeError(f"no vector is known of {unknown[0][:40]!r}")
        return np.array([self._vectors[text] for text in texts], np.float32)


def _in_order(rows: TaskRows, ids: Sequence[str], texts: list[str]) -> ProbedTask:
    assert rows.golds is not None and rows.label_logprobs is not None
    position = {id: i for i, id in enumerate(rows.ids)}
    order = [position[id] for id in ids]
    return ProbedTask(texts, rows.golds[order], rows.vectors[order], rows.label_logprobs[order])
