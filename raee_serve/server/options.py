"""The `raee` object of a request body: what a client may ask of admission."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from raee_serve.errors import RaeeError
from raee_serve.records import ExitHead

MAX_K = 1024
"""Most neighbours a client may ask for; keeps one request from costing a pass over the table."""

FIELDS = ("exit_layer", "head", "task", "k", "budget", "off", "explain", "loop_guard")
WITHOUT_TABLE = ("exit_layer", "head", "off", "explain", "loop_guard")
"""Fields that mean something on a server without a table."""
HEADS: tuple[ExitHead, ...] = ("plain", "shortcut", "probe")


class RequestError(RaeeError):
    """A request that is refused. `parameter` is the field at fault, as in `raee.k`, if it is one's.

    The message repeats at most the beginning of what the client sent.
    """

    def __init__(
        self, parameter: str | None, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST
    ) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.status = status


class MethodError(RequestError):
    """A method that the route does not take. allowed: the ones it does, as in an Allow header."""

    def __init__(self, allowed: str) -> None:
        super().__init__(None, f"allowed: {allowed}", HTTPStatus.METHOD_NOT_ALLOWED)
        self.allowed = allowed


class OptionError(RequestError):
    """A bad `raee` object."""


@dataclass(frozen=True, slots=True)
class RaeeOptions:
    """What the request asked for; a field left at None is for the server to choose.

    exit_layer: 1..num_layers, "full" having been resolved to num_layers; None means "auto".
    head: what turns the state after the exit layer into an answer.
    budget: share of the best exit's expected quality that is to be kept, within (0, 1].
    off: vanilla vLLM, whatever else is asked for. explain: put the decisions into the answer.
    loop_guard: begin again at full depth if the answer at an early exit falls into a loop.
    """

    exit_layer: int | None = None
    head: ExitHead | None = None
    task: str | None = None
    k: int | None = None
    budget: float | None = None
    off: bool = False
    explain: bool = False
    loop_guard: bool | None = None


def parse_options(
    value: Any, *, num_layers: int, tasks: Collection[str], shortcut_layers: Sequence[int] = ()
) -> RaeeOptions:
    """Check a body's `raee` value (None when the body has none).

    tasks: names the loaded table knows; empty when the server runs without a table.
    shortcut_layers: those at which the engine has shortcuts.
    Raises OptionError naming the value and what is allowed.
    """
    if value is None:
        return RaeeOptions()
    if not isinstance(value, dict):
        raise OptionError(
            "raee", f"raee is {shown(value)}; allowed: an object with {_list(FIELDS)}"
        )
    if unknown := [key for key in value if key not in FIELDS]:
        name = shown(unknown[0])
        raise OptionError(
            f"raee.{name[1:-1]}", f"raee has no field {name}; allowed: {_list(FIELDS)}"
        )
    given = {key: item for key, item in value.items() if item is not None}
    if not tasks and (beside := [key for key in given if key not in WITHOUT_TABLE]):
        raise OptionError(
            f"raee.{beside[0]}",
            f"raee.{beside[0]} needs an exit table, and this server was started without one "
            f"(--table); allowed: {_list(WITHOUT_TABLE)}",
        )
    exit_layer = _exit_layer(given.get("exit_layer", "auto"), num_layers)
    return RaeeOptions(
        exit_layer=exit_layer,
        head=_head(given.get("head"), exit_layer, shortcut_layers),
        task=_task(given.get("task"), tasks),
        k=_k(given.get("k")),
        budget=_budget(given.get("budget")),
        off=_flag("off", given.get("off", False)),
        explain=_flag("explain", given.get("explain", False)),
        loop_guard=_flag("loop_guard", given["loop_guard"]) if "loop_guard" in given else None,
    )


def shown(value: Any) -> str:
    """A client's value for an error message: one line of ASCII, cut short where it is long."""
    return reprlib.repr(value).encode("ascii", "backslashreplace").decode()


def _exit_layer(value: Any, num_layers: int) -> int | None:
    if value == "auto":
        return None
    if value == "full":
        return num_layers
    if not (_is_int(value) and 1 <= value <= num_layers):
        raise OptionError(
            "raee.exit_layer",
            f"raee.exit_layer is {shown(value)}; allowed: an integer in 1..{num_layers}, "
            "'full' or 'auto'",
        )
    return int(value)


def _head(value: Any, exit_layer: int | None, shortcut_layers: Sequence[int]) -> ExitHead | None:
    if value is None:
        return None
    if value not in HEADS:
        raise OptionError("raee.head", f"raee.head is {shown(value)}; allowed: {_list(HEADS)}")
    if value == "shortcut" and exit_layer not in shortcut_layers:
        layers = _list(list(map(str, shortcut_layers))) or "none on this server"
        raise OptionError(
            "raee.head",
            f"raee.head is 'shortcut' and raee.exit_layer is {exit_layer or 'auto'}; layers that "
            f"have shortcuts: {layers}",
        )
    head: ExitHead = value
    return head


def _budget(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value <= 1):
        raise OptionError(
            "raee.budget",
            f"raee.budget is {shown(value)}; allowed: a number above 0 and at most 1",
        )
    return value


def _k(value: Any) -> int | None:
    if value is not None and not (_is_int(value) and 1 <= value <= MAX_K):
        raise OptionError("raee.k", f"raee.k is {shown(value)}; allowed: an integer in 1..{MAX_K}")
    return value


def _flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(
            f"raee.{field}", f"raee.{field} is {shown(value)}; allowed: true or false"
        )
    return value


def _task(value: Any, allowed: Collection[str]) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in allowed):
        raise OptionError(
            "raee.task", f"raee.task is {shown(value)}; allowed: {_list(sorted(allowed))}"
        )
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list(names: Collection[str]) -> str:
    return ", ".join(names)
