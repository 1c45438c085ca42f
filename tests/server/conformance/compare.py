"""Answers of two servers side by side: equal, or of one shape."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

LOGPROB_NOISE = 0.01
"""Largest difference of two log-probabilities that were computed in batches of other sizes."""

UNIQUE = {"id", "item_id", "call_id", "created", "created_at", "completed_at", "sequence_number"}
"""Members that differ from request to request; what kind of value they have still counts, and of
text what is before the random digits."""
JOINED = {"content", "text", "arguments", "delta", "refusal", "reasoning", "reasoning_content"}
"""Texts of which a stream brings one piece after the other."""
SAME_AT_ANY_DEPTH = {"finish_reason", "prompt_tokens", "object", "role", "model", "status", "type"}
"""Members whose value is part of an answer's shape."""
ENDS = {"stop", "length"}
"""Reasons to finish of which one or the other may hold, as the text goes."""
BY_TOKEN = {"top_logprobs", "prompt_logprobs"}
"""Members that may be an object with a key for each token."""


def normal(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from request to request, and a stream's chunks put together.

    How many chunks a stream has, and where it is cut, is a matter of time.
    """
    found = {name: answer[name] for name in ("status", "body", "error") if name in answer}
    if "chunks" in answer:
        chunks = answer["chunks"]
        parts = [shape(chunk) for chunk in chunks]
        found |= {"stream": _stream(chunks), "chunk": _common(parts)}
    return _without_unique(found)


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two normal answers differ, as `path: one side | the other`."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{at}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for n, pair in pairs for d in differences(*pair, f"{at}[{n}]")]
    if _is_measured(one, other) and abs(one - other) < LOGPROB_NOISE:
        return []
    return [] if one == other else [f"{at}: {_short(one)} | {_short(other)}"]


def _is_measured(one: Any, other: Any) -> bool:
    """Whether they are numbers and not both counts; JavaScript writes 0.0 as 0."""
    kinds = {type(one), type(other)}
    return float in kinds and kinds <= {int, float}


def shape(value: Any, name: str = "") -> Any:
    """Names, types and what is the same at any depth; of a list what its elements share."""
    if isinstance(value, dict):
        if name in BY_TOKEN:
            return {"each": _common(shape(item) for item in value.values())}
        return {key: shape(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return _common_elements([[shape(item, name) for item in value]])
    if name in SAME_AT_ANY_DEPTH:
        return "/".join(sorted(ENDS)) if value in ENDS else value
    return "number" if isinstance(value, int | float) else type(value).__name__


def _common(shapes: Iterable[Any]) -> Any:
    """One shape for all: of objects the members that any has, of other values the different ones.

    What is null in some is told by the others: where a stream is cut decides how many are null.
    """
    found = [one for one in shapes if one not in (None, "NoneType", "")]
    if found and all(isinstance(one, dict) for one in found):
        keys = sorted({key for one in found for key in one})
        return {key: _common(one[key] for one in found if key in one) for key in keys}
    if found and all(isinstance(one, list) for one in found):
        return _common_elements(found)
    return "/".join(sorted({str(one) for one in found}))


def _common_elements(lists: Iterable[list[Any]]) -> list[Any]:
    elements = [item for one in lists for item in one]
    return [_common(elements)] if elements else []


def _stream(chunks: list[dict[str, Any]]) -> Any:
    """What the chunks of a stream add up to; of a response's events, those of a kind in a row."""
    if any("choices" in chunk for chunk in chunks):
        return _joined(chunks)
    return [_joined(list(group)) for _, group in groupby(chunks, lambda event: event["type"])]


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = _added(key, whole.get(key), value)
    return whole


def _added(key: str, old: Any, new: Any) -> Any:
    if old is None or new is None:
        return old if new is None else new
    if isinstance(new, dict) and isinstance(old, dict):
        return _joined([old, new])
    if isinstance(new, list):
        return _by_index(old + new)
    return old + new if key in JOINED and isinstance(new, str) else new


def _by_index(items: list[Any]) -> list[Any]:
    """Choices and tool calls put together by their number; other lists as they are."""
    if not all(isinstance(item, dict) and "index" in item for item in items):
        return items
    numbers = sorted({item["index"] for item in items})
    return [_joined([item for item in items if item["index"] == n]) for n in numbers]


def _without_unique(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _without_unique(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_unique(item, name) for item in value]
    if name in UNIQUE:
        is_text = isinstance(value, str)
        return re.sub(r"[0-9a-f]{8,}.*", "*", value) if is_text else type(value).__name__
    if name == "system_fingerprint" and value:
        return re.sub(r"-[0-9a-f]{8}$", "", value)  # a hash of the engine's configuration
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."
