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
from raee_serve.exits.choice import Choice
from raee_serve.records import EXIT_HEADS
from raee_serve.retrieval.drawing import pyplot
from raee_serve.retrieval.points_command import MAX_ROWS, TaskExits, task_exits
from raee_serve.table.store import ExitTable

Array = NDArray[np.float64]

DESCRIPTION = f"""Draw a table, one line of pictures a task: at which layer its rows are answered
best, the share of them that each layer answers correctly (of free text, the share of the
reference's tokens), and the depths its rule would give them. Each row is asked as if the table did
not hold it; of a larger task {MAX_ROWS:,} rows stand for all."""

EXIT, DEPTH = "#7a5195", "#c77d0a"
COLORS = {"plain": "#9a9a9a", "shortcut": "#c77d0a", "probe": "#0b6e4f"}
TITLES = ("best exit of each row", "answered correctly after", "depths under the task's rule")


@dataclass(frozen=True, slots=True)
class TaskPicture:
    """What is drawn of one task. Arrays hold one value for each layer, 1..num_layers.

    best_exit: share of the rows that this layer answers best (rows that none answers correctly are
    in none); right: by head, share answered correctly, or of the reference's tokens; NaN for exits
    that have none or never are. depth: share of the rows that the choice gives it.
    """

    name: str
    num_rows: int
    best_exit: Array
    right: dict[str, Array]
    depth: Array
    choice: Choice

    @classmethod
    def of(cls, task: TaskExits) -> TaskPicture:
        rows = task.rows
        best_of_heads = rows.evidence.max(axis=1)
        best = best_of_heads.argmax(axis=1)[best_of_heads.any(axis=1)] + 1
        heads = EXIT_HEADS if rows.kind == "free-text" else (rows.kind,)
        right = rows.worth.mean(axis=0, dtype=np.float64)
        return cls(
            task.name,
            rows.num_rows,
            _shares(best, rows.num_rows, rows.num_layers),
            dict(zip(heads, np.where(right > 0, right, np.nan), strict=True)),
            _shares(task.layers(), rows.num_rows, rows.num_layers),
            task.choice,
        )

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
    """Of every task with two rows or more, by name."""
    table = ExitTable.open(uri)
    tasks = [task_exits(table, name) for name in table.metadata.tasks]
    pictures = [TaskPicture.of(task) for task in tasks if task is not None]
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
    figure.suptitle(f"exit table {title}", fontsize=10)
    figure.savefig(target)
    plt.close(figure)


def _shares(layers: Sequence[int] | NDArray[np.int64], num_rows: int, num_layers: int) -> Array:
    return np.bincount(layers, minlength=num_layers + 1)[1:] / num_rows


def _draw_task(axes: Sequence[Any], picture: TaskPicture) -> None:
    layers = np.arange(1, len(picture.depth) + 1)
    best, right, depth = axes
    best.bar(layers, picture.best_exit, color=EXIT, width=0.8)
    for head, own in picture.right.items():
        right.plot(layers, own, color=COLORS[head], marker=".", label=head)
    right.set_ylim(0, 1)
    right.legend(loc="lower right", fontsize=6, frameon=False, ncols=2)
    depth.bar(layers, picture.depth, color=DEPTH, width=0.8)
    mean = picture.mean_depth
    depth.axvline(mean * len(picture.depth), ymax=0.8, color="#222222", linestyle=":")
    depth.set_ylim(top=1.35 * picture.depth.max())  # room for the line above the bars
    caption = f"budget {picture.choice.budget:g}: mean {mean:.2f} of full depth"
    depth.text(0.99, 0.99, caption, transform=depth.transAxes, fontsize=8, ha="right", va="top")
    best.set_ylabel(f"{picture.name}\n{picture.num_rows:,} rows", fontsize=8)
    for one in axes:
        one.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        one.tick_params(labelsize=7)
        one.xaxis.get_major_locator().set_params(integer=True)
        one.set_xlim(0.4, len(picture.depth) + 0.6)
        one.spines[["top", "right"]].set_visible(False)
