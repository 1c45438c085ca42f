"""What summaries cost and are worth: a table, JSON, and a picture of quality against speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raee_serve.evaluation.metrics import ROUGE_KINDS, rouge
from raee_serve.evaluation.paired import compare_scores
from raee_serve.evaluation.report import markdown_table
from raee_serve.evaluation.summary_turns import FULL_DEPTH, Row, Turn
from raee_serve.retrieval.drawing import pyplot
from raee_serve.server.loops import LoopDetector

PUBLISHED = {"cnndm": 0.1401, "xsum": 0.0715}
"""ROUGE-L in the RAEE paper (arXiv 2405.15198), which does not say of what backbone."""
STYLES = {
    "full depth": ("#222222", "s", ""),
    "plain exit": ("#6b6b6b", "o", ":"),
    "shortcut exit": ("#c77d0a", "o", "--"),
    "retrieved": ("#0b6e4f", "D", "-"),
}
"""Colour, marker and line of each kind of row."""


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row on one task.

    rouge1, rouge2, rougeL: mean F1, 0..1. difference: in ROUGE-L from full depth, over the same
    documents, with its bootstrap 95% interval and p. kept: share of full depth's ROUGE-L.
    depth: mean share of the layers; an answer that looped and was begun again at full depth counts
    both runs. restarted: share of such answers. loops: share of answers that repeat themselves, by
    the loop guard's test on characters; only retrieved exits are guarded. tokens_per_s: of prompts
    and answers; speedup: documents a second over full depth's. reasons: why documents got their
    depths.
    """

    row: str
    kind: str
    n: int
    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815 - as rouge-score names it
    difference: float
    low: float
    high: float
    p: float
    kept: float
    depth: float
    restarted: float
    loops: float
    answer_tokens: float
    tokens_per_s: float
    documents_per_s: float
    speedup: float
    reasons: dict[str, int]


def results(
    rows: Sequence[Row], turns: Sequence[Turn], references: Sequence[str]
) -> list[RowResult]:
    """Of one task. turns: of each row, all documents'; references: [n], in document order."""
    by_row = {
        row.name: sorted((t for t in turns if t.row == row.name), key=lambda t: t.first)
        for row in rows
    }
    full = by_row[FULL_DEPTH.name]
    theirs = rouge([answer.text for turn in full for answer in turn.answers], references)
    return [_result(row, by_row[row.name], references, full, theirs) for row in rows]


def _result(
    row: Row,
    turns: Sequence[Turn],
    references: Sequence[str],
    full: Sequence[Turn],
    theirs: Mapping[str, NDArray[np.float64]],
) -> RowResult:
    answers = [answer for turn in turns for answer in turn.answers]
    scores = rouge([answer.text for answer in answers], references)
    found = compare_scores(scores["rougeL"], theirs["rougeL"])
    seconds = sum(turn.seconds for turn in turns)
    tokens = sum(answer.prompt_tokens + answer.output_tokens for answer in answers)
    mean_full = float(theirs["rougeL"].mean())
    return RowResult(
        row=row.name,
        kind=row.kind,
        n=len(answers),
        **{kind: float(scores[kind].mean()) for kind in ROUGE_KINDS},
        **asdict(found),
        kept=float(scores["rougeL"].mean()) / mean_full if mean_full else 0.0,
        depth=float(np.mean([answer.depth for answer in answers])),
        restarted=float(np.mean([answer.restarted for answer in answers])),
        loops=float(np.mean([has_loop(answer.text) for answer in answers])),
        answer_tokens=float(np.mean([answer.output_tokens for answer in answers])),
        tokens_per_s=tokens / seconds,
        documents_per_s=len(answers) / seconds,
        speedup=sum(turn.seconds for turn in full) / seconds,
        reasons=dict(Counter(answer.reason for answer in answers)),
    )


def has_loop(text: str) -> bool:
    """Whether the loop guard's test finds a loop in its characters.

    Texts are kept without their tokens, and loops are often no whole words ("2000-2000-2000-").
    """
    return LoopDetector().add_all(map(ord, text))


@dataclass(frozen=True, slots=True)
class OverTasks:
    """One row on all tasks of a backbone, each of which counts alike.

    rougeL: mean; kept: share of full depth's mean; depth: mean; speedup: documents a second over
    full depth's, as many of each task.
    """

    row: str
    rougeL: float  # noqa: N815 - as rouge-score names it
    kept: float
    depth: float
    speedup: float


def over_tasks(tasks: Mapping[str, Sequence[RowResult]]) -> list[OverTasks]:
    """Of the rows that all tasks have, full depth first."""
    by_row = [{result.row: result for result in results} for results in tasks.values()]
    names = [name for name in by_row[0] if all(name in own for own in by_row)]
    found = {name: [own[name] for own in by_row] for name in names}
    full = found[FULL_DEPTH.name]
    return [_over_tasks(name, own, full) for name, own in found.items()]


def _over_tasks(name: str, own: Sequence[RowResult], full: Sequence[RowResult]) -> OverTasks:
    rouge_l, theirs = (float(np.mean([r.rougeL for r in rows])) for rows in (own, full))
    seconds, their_seconds = (sum(1 / r.documents_per_s for r in rows) for rows in (own, full))
    return OverTasks(
        name,
        rouge_l,
        kept=rouge_l / theirs if theirs else 0.0,
        depth=float(np.mean([r.depth for r in own])),
        speedup=their_seconds / seconds,
    )


def as_fields(result: RowResult | OverTasks) -> dict[str, Any]:
    """For JSON, numbers rounded to four digits."""
    fields = asdict(result).items()
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in fields}


def published(task: str) -> float | None:
    """ROUGE-L in the paper, of the data set that a task is made of."""
    return PUBLISHED.get(task.partition("_")[0])


HEADINGS = (
    "exit", "ROUGE-1", "ROUGE-2", "ROUGE-L", "against full depth", "kept", "depth", "restarted",
    "loops", "tokens/s", "documents/s", "speed",
)  # fmt: skip
HEADINGS_OVER_TASKS = ("exit", "ROUGE-L", "kept", "depth", "speed")


def as_markdown(found: Mapping[str, Mapping[str, Sequence[RowResult]]]) -> str:
    """found: by model and task. One table each, and one of all tasks of a model."""
    parts = []
    for model, tasks in found.items():
        for task, rows in tasks.items():
            paper = published(task)
            table = markdown_table(HEADINGS, map(_cells, rows))
            beside = "" if paper is None else f" The paper: ROUGE-L {100 * paper:.2f}."
            parts.append(f"### {model}, {task}\n\n{rows[0].n} documents.{beside}\n\n{table}")
        if len(tasks) > 1:
            lines = map(_cells_over_tasks, over_tasks(tasks))
            table = markdown_table(HEADINGS_OVER_TASKS, lines)
            parts.append(f"### {model}, {' and '.join(tasks)}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def draw(found: Mapping[str, Mapping[str, Sequence[RowResult]]], target: Path) -> None:
    """One PNG: of each model and task, ROUGE-L against speed."""
    plt = pyplot()
    panels = [(model, task, rows) for model, tasks in found.items() for task, rows in tasks.items()]
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    size = (5.5 * columns, 3.8 * height)
    figure, grid = plt.subplots(height, columns, figsize=size, dpi=150, squeeze=False)
    for axes, (model, task, rows) in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, rows)
        axes.set_title(f"{model}, {task}, {rows[0].n} documents", fontsize=10)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    grid.flat[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


def _draw_panel(axes: Any, rows: Sequence[RowResult]) -> None:
    axes.axhline(100 * rows[0].rougeL, color=STYLES["full depth"][0], linewidth=0.6)
    for kind, (color, marker, line) in STYLES.items():
        own = sorted((row for row in rows if row.kind == kind), key=lambda row: row.speedup)
        if not own:
            continue
        x, y = [row.speedup for row in own], [100 * row.rougeL for row in own]
        axes.plot(x, y, line or "none", color=color, marker=marker, label=kind, markersize=5)
        for row, at in zip(own, zip(x, y, strict=True), strict=True) if line else ():
            axes.annotate(f" {row.row.split()[1].rstrip(',')}", at, color=color, fontsize=7)
    axes.set_xlabel("documents/s, full depth = 1")
    axes.set_ylabel("ROUGE-L")
    axes.set_ylim(bottom=0)


def _cells_over_tasks(row: OverTasks) -> tuple[str, ...]:
    return (
        row.row,
        f"{100 * row.rougeL:.2f}",
        f"{row.kept:.3f}",
        f"{row.depth:.3f}",
        f"{row.speedup:.2f}",
    )


def _cells(row: RowResult) -> tuple[str, ...]:
    against = f"{100 * row.difference:+.2f} [{100 * row.low:+.2f}, {100 * row.high:+.2f}]"
    return (
        row.row,
        *(f"{100 * getattr(row, kind):.2f}" for kind in ROUGE_KINDS),
        "" if row.row == FULL_DEPTH.name else against,
        f"{row.kept:.3f}",
        f"{row.depth:.3f}",
        f"{row.restarted:.2f}",
        f"{row.loops:.2f}",
        f"{row.tokens_per_s:.0f}",
        f"{row.documents_per_s:.2f}",
        f"{row.speedup:.2f}",
    )
