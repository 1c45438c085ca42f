"""What a seam rests on, and the check that it still stands."""

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass


class SeamError(RuntimeError):
    """The installed vLLM is not the one a seam was written against."""


@dataclass(frozen=True)
class Seam:
    """A dependence on undocumented vLLM.

    name: the seam's file.
    symbols: `module:qualified.name` of each upstream symbol it relies on, to the fingerprint
        of its source in the versions it was checked on.
    """

    name: str
    symbols: Mapping[str, str]

    def check(self) -> None:
        """Raise `SeamError` naming the first symbol that is gone or reads differently."""
        for symbol, expected in self.symbols.items():
            found = fingerprint(symbol)
            if found != expected:
                raise SeamError(
                    f"raee-serve seam '{self.name}': vLLM's {symbol} has source fingerprint "
                    f"{found}, checked was {expected}. Install a vLLM release that "
                    "patches/README.md lists."
                )


def fingerprint(symbol: str) -> str:
    """First 12 hex digits of the SHA-256 of a symbol's source. Raises `SeamError` if gone."""
    module_name, _, qualified_name = symbol.partition(":")
    try:
        target = importlib.import_module(module_name)
        for part in qualified_name.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise SeamError(f"vLLM has no {symbol}: {error}") from error
    return hashlib.sha256(inspect.getsource(target).encode()).hexdigest()[:12]
