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
    Command("table info", "raee_serve.table.info_command", "show what an exit table holds"),
    Command("table plot", "raee_serve.retrieval.plot_command", "draw what an exit table holds"),
    Command(
        "calibrate",
        "raee_serve.retrieval.calibrate_command",
        "choose a task's rule and settings from the table's own rows",
    ),
    Command(
        "serve",
        "raee_serve.server.launch",
        "serve a backbone with retrieved exit layers (takes any flag of `vllm serve`)",
        forwards=True,
    ),
    Command(
        "eval",
        "raee_serve.evaluation.run",
        "measure accuracy and depth through a server (takes any flag of `serve`)",
        forwards=True,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if it did, 1 for an error of the user's, told in one line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((c for c in COMMANDS if argv[: len(c.words.split())] == c.words.split()), None)
    if command is None:
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
    width = max(len(command.words) for command in COMMANDS)
    lines = [f"  {command.words:{width}}  {command.help}" for command in COMMANDS]
    parser = argparse.ArgumentParser(
        "raee-serve",
        description="Serve language models at retrieved exit layers.",
        epilog="commands:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", choices=[command.words for command in COMMANDS], metavar="COMMAND"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
