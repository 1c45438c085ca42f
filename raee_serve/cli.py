"""The `raee-serve` command. A sub-command's module is imported only when it is the one called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from raee_serve.errors import RaeeError


@dataclass(frozen=True, slots=True)
class Command:
    """words: as typed; module: has `add_arguments(parser)` and `run(args)`.

    forwards: the command takes further arguments on behalf of vLLM, as `run(args, rest)`.
    """

    words: str
    module: str
    help: str
    forwards: bool = False


COMMANDS = (
    Command("build", "raee_serve.table.build_command", "build an exit table for a backbone"),
    Command(
        "shortcuts fit",
        "raee_serve.table.shortcuts_command",
        "fit exit shortcuts, which let free text exit earlier",
    ),
    Command(
        "encoder cut",
        "raee_serve.retrieval.cut_encoder_command",
        "cut an encoder to its first layers, for cheaper look-ups",
    ),
    Command("task list", "raee_serve.tasks.list_command", "list the shipped tasks"),
    Command(
        "task check",
        "raee_serve.tasks.check_command",
        "check a task's data, prompt and labels before a build",
    ),
    Command("table info", "raee_serve.table.info_command", "show what an exit table holds"),
    Command("table history", "raee_serve.table.history_command", "list an exit table's versions"),
    Command("table rollback", "raee_serve.table.rollback_command", "return to an old version"),
    Command("table drop", "raee_serve.table.drop_command", "remove tasks from an exit table"),
    Command("table delete", "raee_serve.table.delete_command", "remove rows from an exit table"),
    Command(
        "table compact",
        "raee_serve.table.compact_command",
        "merge an exit table's small files and drop versions long superseded",
    ),
    Command(
        "table reencode",
        "raee_serve.table.reencode_command",
        "write a table of the same rows under another encoder's vectors",
    ),
    Command("table index", "raee_serve.table.index_command", "index a large table's vectors"),
    Command("table check", "raee_serve.table.check_command", "check a table's rows and its index"),
    Command("table plot", "raee_serve.retrieval.plot_command", "draw what an exit table holds"),
    Command(
        "table points",
        "raee_serve.retrieval.points_command",
        "choose exit points by the exits of a table's rows, and tell what they cost",
    ),
    Command(
        "calibrate",
        "raee_serve.evaluation.calibrate_command",
        "choose a task's budget and neighbours from the table's own rows",
    ),
    Command(
        "serve",
        "raee_serve.server.launch",
        "serve a backbone with retrieved exit layers (takes any flag of `vllm serve`)",
        forwards=True,
    ),
    Command(
        "preview",
        "raee_serve.server.preview_command",
        "show what would be decided for a prompt, and why, without an engine",
    ),
    Command(
        "eval",
        "raee_serve.evaluation.run",
        "measure accuracy and depth, offline or through a server (takes any flag of `serve`)",
        forwards=True,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if it did, 1 for an error of the user's, told in one line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((c for c in COMMANDS if argv[: len(c.words.split())] == c.words.split()), None)
    if command is None:
        group = [c for c in COMMANDS if argv and c.words.startswith(f"{argv[0]} ")]
        if group and argv[1:] in ([], ["-h"], ["--help"]):
            print("commands:\n" + _listed(group))
            return 0 if argv[1:] else 2
        _overview().parse_args(argv[:1] if argv[:1] in (["-h"], ["--help"]) else [" ".join(argv)])
        return 2
    return _run(command, argv[len(command.words.split()) :])


def _run(command: Command, argv: list[str]) -> int:
    # No abbreviations: a prefix of one of ours may be a flag of vLLM's.
    parser = argparse.ArgumentParser(
        f"raee-serve {command.words}", description=command.help, allow_abbrev=False
    )
    try:
        module = import_module(command.module)
        module.add_arguments(parser)
        args, rest = parser.parse_known_args(argv)
        if rest and not command.forwards:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return int((module.run(args, rest) if command.forwards else module.run(args)) or 0)
    except RaeeError as e:
        print(f"raee-serve {command.words}: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"raee-serve {command.words}: interrupted", file=sys.stderr)
        return 130


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "raee-serve",
        description="Serve language models at retrieved exit layers.",
        epilog="commands:\n" + _listed(COMMANDS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", choices=[command.words for command in COMMANDS], metavar="COMMAND"
    )
    return parser


def _listed(commands: Sequence[Command]) -> str:
    width = max(len(command.words) for command in commands)
    return "\n".join(f"  {command.words:{width}}  {command.help}" for command in commands)


if __name__ == "__main__":
    sys.exit(main())
