"""`raee-serve table plot`: where the rows of an exit table can exit, and where they would."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import RaeeError, TableError
from raee_serve.retrieval.drawing import pyplot
from raee_serve.retrieval.heads import calibrated
from raee_serve.retrieval.left_out import left_out
from raee_serve.retrieval.task_index import choice_of
from raee_serve.table.evidence import evidence_of, label_evidence
from raee_serve.table.schema import RuleChoice, TaskRows
from raee_serve.table.store import ExitTable

Array = NDArray[np.float64]

DESCRIPTION = """Draw a table, one line of pictures a task: at which layer its rows are answered
best, how many of them each layer answers correctly, and the depths its rule would give them, each
row asked as if the table did not hold it."""

EXIT, PLAIN, CALIBRATED, DEPTH = "#7a5195", "#9a9a9a", "#0b6e4f", "#c77d0a"
TITLES = ("best exit of each row", "rows answered correctly", "depths under the task's rule")


@dataclass(frozen=True, slots=True)
class TaskPicture:
    """What is drawn of one task. Arrays hold one share of its rows for each layer, 1..num_layers.

    layers: those that were probed; best_exit: rows that this layer answers best (rows that none
    answers correctly are in none); right: answered correctly; right_calibrated: so with the bias
    towards a label word taken out, None for free text; depth: rows that the choice gives it.
    """

    name: str
    num_rows: int
    layers: tuple[int, ...]
    best_exit: Array
    right: Array
    right_calibrated: Array | None
    depth: Array
    choice: RuleChoice

    @property
    def mean_depth(self) -> float:
        """As a share of full depth."""
        layers = np.arange(1, len(self.depth) + 1)
        return float(self.depth @ layers / len(self.depth))


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("table", metavar="DIR")
    parser.add_argument("--out", required=True, metavar="FILE", type=Path, help="a PNG file")


def run(args: Namespace) -> None:
    """Raises TableError for a table that is unusable or holds no task of two rows or more."""
    plt = pyplot()
    if not args.out.parent.is_dir():
        raise RaeeError(f"--out {args.out}: there is no directory {args.out.parent}")
    pictures = task_pictures(args.table)
    draw(plt, args.table, pictures, args.out)
    print(f"raee-serve: drew {', '.join(p.name for p in pictures)} of {args.table} in {args.out}")


def task_pictures(uri: str) -> list[TaskPicture]:
    """Of every task with two rows or more, in table order."""
    table = ExitTable.open(uri)
    tasks = [(name, table.rows(name)) for name in table.metadata.tasks]
    pictures = [_picture(table, name, rows) for name, rows in tasks if len(rows) > 1]
    if not pictures:
        raise TableError(f"exit table {uri} holds no task of two rows or more; build it first")
    return pictures


def draw(plt: Any, title: str, pictures: Sequence[TaskPicture], target: Path) -> None:
    figure, grid = plt.subplots(
        len(pictures),
        len(TITLES),
        figsize=(11, 1.0 + 1.15 * len(pictures)),
        dpi=130,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, picture in zip(grid, pictures, strict=True):
        _draw_task(axes, picture)
    for axes, heading in zip(grid[0], TITLES, strict=True):
        axes.set_title(heading, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("layer", fontsize=8)
    if any(picture.right_calibrated is not None for picture in pictures):
        grid[0][1].legend(loc="upper left", fontsize=6, frameon=False, ncols=2)
    figure.suptitle(f"exit table {title}", fontsize=10)
    figure.savefig(target)
    plt.close(figure)


def _picture(table: ExitTable, name: str, rows: TaskRows) -> TaskPicture:
    entry, num_layers = table.metadata.tasks[name], table.metadata.backbone.num_layers
    choice = choice_of(table.metadata, entry)
    evidence = evidence_of(rows, entry, num_layers)
    exits = left_out(rows, entry, num_layers).layers(choice)
    right_calibrated = None
    if rows.golds is not None and rows.label_logprobs is not None:
        scores = rows.label_logprobs - calibrated(rows.label_logprobs).bias
        right_calibrated = (label_evidence(scores, rows.golds) > 0).mean(axis=0)
    best = evidence.argmax(axis=1)[evidence.any(axis=1)] + 1
    return TaskPicture(
        name,
        len(rows),
        entry.layers,
        _shares(best, len(rows), num_layers),
        (evidence > 0).mean(axis=0),
        right_calibrated,
        _shares(exits, len(rows), num_layers),
        choice,
    )


def _shares(layers: NDArray[np.int64], num_rows: int, num_layers: int) -> Array:
    return np.bincount(layers, minlength=num_layers + 1)[1:] / num_rows


def _draw_task(axes: Sequence[Any], picture: TaskPicture) -> None:
    layers = np.array(picture.layers)
    best, right, depth = axes
    best.bar(layers, picture.best_exit[layers - 1], color=EXIT, width=0.8)
    right.plot(layers, picture.right[layers - 1], color=PLAIN, marker=".", label="as it is")
    if picture.right_calibrated is not None:
        own = picture.right_calibrated[layers - 1]
        right.plot(layers, own, color=CALIBRATED, marker=".", label="calibrated")
    right.set_ylim(0, 1)
    depth.bar(np.arange(1, len(picture.depth) + 1), picture.depth, color=DEPTH, width=0.8)
    mean = picture.mean_depth
    depth.axvline(mean * len(picture.depth), ymax=0.8, color="#222222", linestyle=":")
    depth.set_ylim(top=1.35 * picture.depth.max())  # room for the line above the bars
    caption = f"{picture.choice.rule}: mean {mean:.2f} of full depth"
    depth.text(0.99, 0.99, caption, transform=depth.transAxes, fontsize=8, ha="right", va="top")
    best.set_ylabel(f"{picture.name}\n{picture.num_rows:,} rows", fontsize=8)
    for one in axes:
        one.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        one.tick_params(labelsize=7)
        one.xaxis.get_major_locator().set_params(integer=True)
        one.set_xlim(0.4, len(picture.depth) + 0.6)
        one.spines[["top", "right"]].set_visible(False)
