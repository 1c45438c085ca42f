"""Exit tables that a benchmark needs before it can begin."""

from collections.abc import Sequence

from raee_serve.cli import main as run_command


def build_table(
    model: str, tasks: Sequence[str], table: str, limit: int, data: str | None = None
) -> None:
    """By the command that a user would type; what is in the table already is kept.

    limit: rows of each task. data: directory of the data sets, which demo tasks do without. Raises
    `SystemExit` if it fails.
    """
    named = [part for task in tasks for part in ("--task", task)]
    root = ["--data", data] if data is not None else []
    command = ["build", "--model", model, *named, "--table", table, *root, "--limit", str(limit)]
    if run_command(command):
        raise SystemExit(1)
