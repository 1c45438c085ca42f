"""Requests through the openai SDK, and what their answers say."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass

from tests.server.conftest import MODEL

LABELS = (" terrible", " great")


@dataclass(frozen=True)
class Reply:
    """texts, logprobs: one per prompt; logprobs of the first token, by token.

    layers, heads, reasons, tasks, distances: as the headers state them, one per prompt.
    """

    texts: list[str]
    logprobs: list[dict[str, float]]
    layers: list[int]
    heads: list[str]
    reasons: list[str]
    tasks: list[str]
    distances: list[str]


def complete(served, prompt, *, raee=None, **fields) -> Reply:
    """One request to /v1/completions, greedy, with the first token's best logprobs."""
    extra = fields.pop("extra_body", {}) | ({} if raee is None else {"raee": raee})
    settings = {"temperature": 0, "max_tokens": 1, "logprobs": 5} | fields
    raw = served.client.completions.with_raw_response.create(
        model=MODEL, prompt=prompt, extra_body=extra, **settings
    )
    choices = raw.parse().choices
    headers = decisions(raw.headers)
    return Reply(
        [choice.text for choice in choices],
        [choice.logprobs.top_logprobs[0] for choice in choices if choice.logprobs],
        **headers,
    )


def decisions(headers) -> dict[str, list]:
    """The decision headers, split per prompt."""

    def values(name):
        return headers[f"x-raee-{name}"].split(", ")

    assert len(values("num-layers")) == len(values("lookup-ms")) == len(values("reason"))
    return {
        "layers": [int(layer) for layer in values("exit-layer")],
        "heads": values("exit-head"),
        "reasons": values("reason"),
        "tasks": values("task"),
        "distances": values("distance"),
    }


def post(served, path, body, headers=None) -> tuple[int, dict, dict]:
    """(status, headers, JSON) of a raw request, for what the SDK would not send."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        served.url + path, data, {"content-type": "application/json"} | (headers or {})
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, dict(answer.headers), json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), json.load(error)
