"""Builds tables over a Ray cluster: encode and probe are Ray Data stages, this process writes.

Groups of batches, which one process would work through in turn, are the rows of a Ray data set. A
pool of workers with the encoder embeds their texts, a pool with the backbone probes their prompts,
and what comes back is written as it comes: rows that are in the table when a build is killed stay,
and the next build asks for the others alone. The only module that imports ray.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from raee_serve.checkpoints import local_checkpoint
from raee_serve.errors import RaeeError
from raee_serve.fingerprint import identify_backbone
from raee_serve.retrieval.encoder import Encoder
from raee_serve.shortcuts import Shortcuts
from raee_serve.table.build import TaskWork
from raee_serve.table.probe import LayerProbe
from raee_serve.table.rows import Batch, RowMaker
from raee_serve.table.schema import TableMetadata, TaskRows
from raee_serve.table.store import ExitTable

LOCAL = "local"
"""The address that stands for a cluster of its own on this machine."""
CONNECT_TIMEOUT_S = 10
ENCODER_SHARE = 4
"""Without GPUs one worker in so many embeds: a backbone takes far longer for a prompt."""


@dataclass(frozen=True, slots=True)
class Models:
    """What workers load, and what it must turn out to be on every machine of the cluster.

    backbone, encoder: names, directories or hub ids; dtype: of the backbone, None for the
    device's own. shortcuts: that free text is probed through, if any.
    """

    backbone: str
    encoder: str
    dtype: torch.dtype | None
    expected: TableMetadata
    shortcuts: Shortcuts | None = None


@dataclass(frozen=True, slots=True)
class Pools:
    """How many workers of either kind, each with one CPU; gpus: whether those that probe have one
    each."""

    encode: int
    probe: int
    gpus: bool

    @classmethod
    def of(cls, resources: dict[str, float], workers: int | None) -> Pools:
        """As a cluster's resources allow; workers: how many probe, if that is set.

        Raises RaeeError for a cluster without the CPUs for one worker of either kind.
        """
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if cpus < 1 + (workers or 1):
            raise RaeeError(
                f"the Ray cluster has {cpus} CPUs; {workers or 1} to probe and one to encode are "
                "needed"
            )
        probe = workers or min(gpus, cpus - 1) or cpus - max(1, cpus // ENCODER_SHARE)
        return cls(encode=cpus - probe, probe=probe, gpus=gpus >= probe)


@dataclass(frozen=True, slots=True)
class Group:
    """A group of batches on its way through the stages. vectors: None until they are embedded."""

    maker: RowMaker
    batches: Sequence[Batch]
    vectors: Any = None


class EncodeStage:
    """A worker with the encoder."""

    def __init__(self, models: Models) -> None:
        self._encoder = Encoder(models.encoder)
        models.expected.check_encoder(self._encoder.identity(), "to be built")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        group: Group = pickle.loads(row["group"])
        vectors = group.maker.vectors(self._encoder, group.batches)
        return {"group": pickle.dumps(replace(group, vectors=vectors))}


class ProbeStage:
    """A worker with the backbone."""

    def __init__(self, models: Models) -> None:
        checkpoint = local_checkpoint(models.backbone)
        models.expected.check_backbone(identify_backbone(checkpoint), "to be built")
        self._probe = LayerProbe(checkpoint, models.dtype, models.shortcuts)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        group: Group = pickle.loads(row["group"])
        scores = [group.maker.scores(self._probe, batch) for batch in group.batches]
        rows = group.maker.rows(group.batches, group.vectors, scores)
        return {"rows": pickle.dumps((group.maker.entry.name, rows))}


class ReadBackbone:
    """What tokenising needs of a checkpoint, its weights left alone; see `ReadsPrompts`."""

    def __init__(self, checkpoint: str, shortcuts: Shortcuts | None = None) -> None:
        self.shortcuts = shortcuts
        config = AutoConfig.from_pretrained(checkpoint).get_text_config()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self.num_layers = int(config.num_hidden_layers)
        self.max_length = int(config.max_position_embeddings)


@contextmanager
def cluster(address: str) -> Iterator[dict[str, float]]:
    """Connected to the cluster at `address`, or to a new local one; its resources.

    Raises RaeeError if ray is missing or the cluster cannot be reached.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray is imported
        import ray
    except ImportError as e:
        raise RaeeError("--ray needs Ray: install raee-serve[ray]") from e
    if address != LOCAL:
        _check_reachable(address)
    # Two workers of one CPU each at the least, however few cores there are.
    num_cpus = max(2, os.cpu_count() or 1) if address == LOCAL else None
    ray.init(address=address, num_cpus=num_cpus, logging_level=logging.ERROR, log_to_driver=False)
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises RaeeError if nothing listens there, at which Ray would end this process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as e:
        raise RaeeError(
            f"cannot join a Ray cluster at {address!r}: {e}; expected host:port or ray://host:port"
        ) from e


def build_over_cluster(
    table: ExitTable,
    work: Sequence[TaskWork],
    models: Models,
    pools: Pools,
    *,
    store_text: bool = False,
    progress: bool = True,
) -> None:
    """Makes and stores the rows of all tasks, in the order in which workers finish them.

    Within `cluster`. What is done when this ends early, or is killed, stays done. Raises RaeeError
    if a worker fails, a BindingError of its own included.
    """
    groups = [
        Group(RowMaker(task.entry, store_text), batches) for task in work for batches in task.groups
    ]
    total = sum(task.added for task in work)
    with tqdm(total=total, unit="row", disable=not progress) as bar:
        for task, rows in _finished(groups, models, pools):
            table.add(task, rows)
            bar.update(len(rows))


def _finished(
    groups: Sequence[Group], models: Models, pools: Pools
) -> Iterator[tuple[str, TaskRows]]:
    """(task, rows) of each group, as they come."""
    if not groups:
        return
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    loaded: dict[str, Any] = {"fn_constructor_args": (models,), "num_cpus": 1}
    rows: list[Any] = [{"group": pickle.dumps(group)} for group in groups]
    made = (
        from_items(rows, override_num_blocks=len(rows))
        .map(
            cast(Any, EncodeStage),
            compute=ActorPoolStrategy(min_size=1, max_size=pools.encode),
            **loaded,
        )
        .map(
            cast(Any, ProbeStage),
            compute=ActorPoolStrategy(size=pools.probe),
            num_gpus=int(pools.gpus),
            **loaded,
        )
    )
    try:
        for row in made.iter_rows():
            yield pickle.loads(row["rows"])
    except ray.exceptions.RayError as e:
        raise RaeeError(f"a Ray worker failed: {e}") from e
