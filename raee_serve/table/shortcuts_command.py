"""`raee-serve shortcuts fit`: fit exit shortcuts for a backbone, beside its exit table."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from raee_serve.checkpoints import local_checkpoint
from raee_serve.errors import RaeeError, TableError
from raee_serve.fingerprint import BackboneIdentity, identify_backbone
from raee_serve.shortcuts import Shortcuts, beside_table
from raee_serve.table.build import DEFAULT_BATCH_TOKENS
from raee_serve.table.probe import DTYPES, LayerProbe
from raee_serve.table.rows import Item, ItemMaker
from raee_serve.table.schema import TaskEntry
from raee_serve.table.shortcuts import (
    DEFAULT_TOKENS,
    check_layers,
    default_layers,
    fit_shortcuts,
    split_documents,
)
from raee_serve.table.store import ExitTable, exists
from raee_serve.tasks.datasets import (
    Example,
    add_data_argument,
    add_words_argument,
    shuffled_examples,
)
from raee_serve.tasks.registry import add_task_argument, get_tasks
from raee_serve.tasks.task import Task

DESCRIPTION = """Fit, for some layers, a linear map from the state after the layer to that after the
last one, on the text of tasks, and store the maps beside the exit table. A build that finds them
there records what exits through them are worth; a server offers them."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--model", required=True, help="packaged name, checkpoint directory or hub id"
    )
    parser.add_argument("--table", required=True, metavar="DIR", help="need not be built yet")
    note = "whose training text to fit on (default: the table's free-text tasks); "
    add_task_argument(parser, note, required=False)
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        metavar="N",
        help="exit layers that get a shortcut (default: four in the last third of the backbone)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help="fit on at most so many, evenly of all tasks (default: %(default)s)",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="overwrite shortcuts that rows of the table were probed through; these rows are of no "
        "use to a server until build --replace has made them anew",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the backbone's weights")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle of each task's text")
    add_file_argument(parser)
    add_data_argument(parser)
    add_words_argument(parser)


def add_file_argument(parser: ArgumentParser) -> None:
    """--shortcuts-file, which a table in object storage needs."""
    parser.add_argument(
        "--shortcuts-file",
        metavar="FILE",
        help="where the exit shortcuts are (default: shortcuts.safetensors in the table's "
        "directory; one in object storage has none, so name a local file)",
    )


def run(args: Namespace) -> None:
    """Fit and store. Raises RaeeError for what cannot be, before the backbone is loaded."""
    target = target_file(args.table, args.shortcuts_file)
    checkpoint = local_checkpoint(args.model)
    backbone = identify_backbone(checkpoint)
    layers = check_layers(args.layers or default_layers(backbone.num_layers), backbone.num_layers)
    tasks = _tasks(args, backbone)
    work = [
        (task, shuffled_examples(task, "train", args.data, args.seed, args.words)) for task in tasks
    ]
    probe = LayerProbe(checkpoint, DTYPES[args.dtype])
    fit_and_store(probe, backbone, work, layers, args.tokens, target)


def target_file(table: str, given: str | None) -> Path:
    """Where a table's shortcuts go. Raises TableError for one without a directory, if no file is
    given."""
    target = Path(given) if given is not None else beside_table(table)
    if target is None:
        raise TableError(
            f"exit table {table} is in object storage, where shortcuts cannot be kept; give "
            "--shortcuts-file FILE, here and to serve"
        )
    return target


def fit_and_store(
    probe: LayerProbe,
    backbone: BackboneIdentity,
    work: Sequence[tuple[Task, Sequence[Example]]],
    layers: Sequence[int],
    max_tokens: int,
    target: Path,
) -> Shortcuts:
    """Fitted on the texts, evenly of all tasks; says what each is worth. Raises RaeeError.

    work: all of a task's training rows, in the order in which a build takes them.
    """
    fitted: list[Item] = []
    held_out: dict[str, list[Item]] = {}
    for task, examples in work:
        parts = split_documents(_items(task, examples, probe), max_tokens // len(work))
        fitted += parts[0]
        held_out[task.name] = parts[1]
    shortcuts, reports = fit_shortcuts(
        probe, backbone, (fitted, held_out), layers, DEFAULT_BATCH_TOKENS
    )
    shortcuts.save(target)
    names, others = ", ".join(held_out), sum(map(len, held_out.values()))
    print(f"shortcuts fitted on {len(fitted)} documents of {names}, {others} held out:")
    for report in reports:
        print(f"  {report}")
    print(f"raee-serve: stored shortcuts {shortcuts.digest} in {target}", flush=True)
    return shortcuts


def _items(task: Task, examples: Sequence[Example], probe: LayerProbe) -> Iterator[Item]:
    """What to fit on, the last first: what rows record of an exit by shortcut is too good where
    the shortcut was fitted on them."""
    maker = ItemMaker(task, probe)
    return (maker.item(example) for example in reversed(examples))


def _tasks(args: Namespace, backbone: BackboneIdentity) -> list[Task]:
    """Whose text is fitted on. Raises RaeeError if the table is another backbone's, or its rows
    would lose the shortcuts that they were probed through."""
    entries = _entries(args.table, backbone)
    bound = [name for name, entry in entries.items() if entry.shortcut_layers]
    if bound and not args.replace:
        raise TableError(
            f"exit table {args.table}: rows of {', '.join(bound)} were probed through the present "
            "shortcuts; with --replace they are overwritten, and then need build --replace"
        )
    names = args.task or [name for name, entry in entries.items() if entry.kind == "free-text"]
    if not names:
        raise RaeeError(f"exit table {args.table} holds no free-text task; name tasks with --task")
    return get_tasks(names)


def _entries(uri: str, backbone: BackboneIdentity) -> Mapping[str, TaskEntry]:
    """The table's tasks; none where there is no table yet."""
    if not exists(uri):
        return {}
    metadata = ExitTable.open(uri).metadata
    metadata.check_backbone(backbone, uri)
    return metadata.tasks
