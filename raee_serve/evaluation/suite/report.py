"""Studies as pictures, as one HTML page that needs no other file, and as Markdown tables."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from raee_serve.evaluation.report import markdown_table
from raee_serve.evaluation.suite.findings import Findings, Picture, Row, columns_of
from raee_serve.retrieval.drawing import pyplot

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2430; background: #fff }
h2 { margin: 3rem 0 .5rem } p.note, p.settings { color: #5a6675; font-size: .9rem }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e3e7ec }
th:first-child, td:first-child { text-align: left } img { max-width: 100%; margin: 1rem 0 }
@media (prefers-color-scheme: dark) { body { color: #dde3ea; background: #14181d }
  th, td { border-color: #2b323a } img { background: #fff; border-radius: 6px } }
"""


def draw(found: Findings, title: str, file: Path) -> None:
    """`found.picture` and what is beside it. Raises RaeeError without matplotlib."""
    panels = [found.picture, *found.beside]
    plt = pyplot()
    size = (8 * len(panels), 5)
    figure, grid = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, picture in zip(grid[0], panels, strict=True):
        _draw_panel(axes, picture, found.rows)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _draw_panel(axes: Any, picture: Picture, rows: Sequence[Row]) -> None:
    """Rows without the picture's figures are left out."""
    rows = [row for row in rows if all(_is_figure(row.get(c)) for c in (picture.x, picture.y))]
    for name in dict.fromkeys(row[picture.series] for row in rows):
        own = sorted((r for r in rows if r[picture.series] == name), key=lambda r: r[picture.x])
        _draw_series(axes, picture, str(name), own)
    if picture.log:
        axes.set_xscale("log")
    axes.set_xlabel(picture.x)
    axes.set_ylabel(picture.y)
    axes.grid(alpha=0.25)
    if rows:
        axes.legend(fontsize=8)


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float)


def _draw_series(axes: Any, picture: Picture, name: str, rows: Sequence[Row]) -> None:
    x, y = ([float(row[column]) for row in rows] for column in (picture.x, picture.y))
    style = "o-" if picture.joined else "o"
    [drawn] = axes.plot(x, y, style, markersize=4, label=name)
    if picture.error is None:
        return
    low, high = ([float(row[end]) for row in rows] for end in picture.error)
    if picture.joined:
        axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.12)
    else:
        axes.vlines(x, low, high, color=drawn.get_color(), alpha=0.4)


def write_report(out: Path, studies: Mapping[str, Any]) -> Path:
    """out/report.html, and the same tables in report.md, of all the studies that `out` holds, in
    the order of `studies`."""
    done = [name for name in studies if (out / f"{name}.json").is_file()]
    parts = [_section(out, name) for name in done]
    tables = [_markdown(json.loads((out / f"{name}.json").read_text())) for name in done]
    (out / "report.md").write_text("\n".join(tables), encoding="utf-8")
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>raee-serve: studies</title>'
        f"<style>{STYLE}</style><h1>What retrieved exits give and cost</h1>{''.join(parts)}</html>"
    )
    file = out / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


def _section(out: Path, name: str) -> str:
    kept = json.loads((out / f"{name}.json").read_text())
    settings = ", ".join(f"{key} {value}" for key, value in kept["settings"].items())
    picture = out / f"{name}.png"
    image = ""
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        image = (
            f'<img alt="{escape(name)}: a picture of the table" src="data:image/png;base64,{data}">'
        )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in kept["notes"])
    return (
        f'<h2 id="{escape(name)}">{escape(name)}</h2><p>{escape(kept["question"])}</p>{image}'
        f'<div class="wide">{_table(kept["rows"])}</div>{notes}'
        f'<p class="settings">{escape(settings)}</p>'
    )


def _markdown(kept: dict[str, Any]) -> str:
    columns = columns_of(kept["rows"])
    table = markdown_table(
        columns, ([str(row.get(column, "")) for column in columns] for row in kept["rows"])
    )
    notes = [f"- {note}" for note in kept["notes"]]
    return "\n".join([f"## {kept['study']}", kept["question"], "", table, "", *notes, ""])


def _table(rows: list[Row]) -> str:
    columns = columns_of(rows)
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(row.get(c, '')))}</td>" for c in columns) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
