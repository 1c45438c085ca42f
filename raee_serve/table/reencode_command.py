"""`raee-serve table reencode`: the same rows under another encoder's vectors."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from raee_serve.errors import RaeeError
from raee_serve.retrieval.encoder import Encoder
from raee_serve.shortcuts import beside_table, find_shortcuts
from raee_serve.table.build import complete
from raee_serve.table.key_texts import key_texts
from raee_serve.table.schema import TableMetadata
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import add_data_argument, add_words_argument
from raee_serve.tasks.registry import TASKS, add_task_argument, get_tasks

DESCRIPTION = """Write a table of the same rows with the vectors of another encoder. Probes are
fitted anew to the states that the old table keeps, so no backbone runs. Texts come from the rows,
or from the training data that they were made of. Calibrated choices were made from the old vectors
and are left out."""
AT_ONCE = 512


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("table", metavar="DIR")
    parser.add_argument("--encoder", required=True, help="packaged name, directory or hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new table; must not exist")
    note = "for texts that neither the rows nor a shipped task have; "
    add_task_argument(parser, note, required=False)
    add_data_argument(parser)
    add_words_argument(parser)


def run(args: Namespace) -> None:
    if Path(args.out).exists():
        raise RaeeError(f"--out {args.out} exists; name a directory that does not")
    old = ExitTable.open(args.table)
    # Everything cheap that can fail comes before anything is encoded.
    rows = {name: old.rows(name, vectors=False) for name in old.metadata.tasks}
    tasks = TASKS | {task.name: task for task in get_tasks(args.task or ())}
    texts = {
        name: key_texts(tasks.get(name) or old.entry(name).task, own, args.data, args.words)
        for name, own in rows.items()
    }
    encoder = Encoder(args.encoder, threads=torch.get_num_threads())
    # All of it before the new table is there: one that was cut short could be served.
    vectors = {name: _encoded(encoder, name, own) for name, own in texts.items()}
    new = ExitTable.open_or_create(
        args.out, TableMetadata(old.metadata.backbone, encoder.identity())
    )
    for name, own in rows.items():
        new.put_task(old.metadata.tasks[name])
        if len(own):
            states = _states(old, name, own.ids)
            new.add(name, replace(own, vectors=vectors[name], states=states))
            if name in old.metadata.built:
                complete(new, name)
    shortcuts, copy = find_shortcuts(args.table, None), beside_table(args.out)
    if shortcuts is not None and copy is not None:
        shutil.copyfile(shortcuts, copy)
    print(f"raee-serve: {new.count_rows()} rows under {encoder.identity()} in {args.out}")


def _states(table: ExitTable, task: str, ids: Sequence[str]) -> NDArray[np.float16] | None:
    """[rows, layers, hidden_size] of a label task; None for free text, which needs none."""
    if table.metadata.tasks[task].kind == "free-text":
        return None
    return table.states(task, ids).transpose(1, 0, 2)


def _encoded(encoder: Encoder, task: str, texts: Sequence[str]) -> NDArray[np.float32]:
    """[texts, dimension], in order."""
    blocks = range(0, len(texts), AT_ONCE)
    bar = tqdm(blocks, desc=task, unit=f" x {AT_ONCE} rows")
    vectors = [encoder.encode(texts[first : first + AT_ONCE]) for first in bar]
    return np.concatenate([np.empty((0, encoder.dimension), np.float32), *vectors])
