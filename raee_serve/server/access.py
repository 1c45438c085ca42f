"""What of raee-serve's own surface a server offers, and how large a request it reads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from raee_serve.errors import RaeeError

MAX_BODY_BYTES = 64 * 2**20
MAX_PROMPTS = 1024

SWITCHES = {
    "explain": "refuse requests that ask why (raee.explain), and leave it out of previews",
    "preview": "do not serve /v1/raee/preview",
    "reload": "do not serve /v1/raee/reload",
    "page": "do not serve the page at /raee, nor /v1/raee/page, from which it knows the tasks",
}
"""What `--disable-NAME` takes away; a route under /v1/raee/ has its own name."""


@dataclass(frozen=True, slots=True)
class Access:
    """disabled: of SWITCHES.

    max_body_bytes, max_prompts: of one request that admission or a route of ours reads.
    """

    disabled: frozenset[str] = frozenset()
    max_body_bytes: int = MAX_BODY_BYTES
    max_prompts: int = MAX_PROMPTS

    def __post_init__(self) -> None:
        for flag, value in (
            ("--max-body-bytes", self.max_body_bytes),
            ("--max-prompts", self.max_prompts),
        ):
            if value < 1:
                raise RaeeError(f"{flag} is {value}; allowed: at least 1")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Access:
        """From `add_arguments`' flags. Raises RaeeError for a bad one."""
        disabled = {name for name in SWITCHES if getattr(args, f"disable_{name}")}
        return cls(frozenset(disabled), args.max_body_bytes, args.max_prompts)

    def allows(self, name: str) -> bool:
        return name not in self.disabled

    def __str__(self) -> str:
        return ", ".join(f"{name} {'on' if self.allows(name) else 'off'}" for name in SWITCHES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, what in SWITCHES.items():
        parser.add_argument(f"--disable-{name}", action="store_true", help=what)
    parser.add_argument(
        "--max-body-bytes",
        type=int,
        default=MAX_BODY_BYTES,
        metavar="N",
        help="largest body of a completions, chat or preview request (default: %(default)s)",
    )
    parser.add_argument(
        "--max-prompts",
        type=int,
        default=MAX_PROMPTS,
        metavar="N",
        help="most prompts in one request (default: %(default)s)",
    )
