"""Runs cases with the official Python SDK; run.mjs does the same with the one for Node.

A plan is {"base_url", "cases": [{"name", "call", "body", "extra"}]}, and an answer to a case has
`status` and `headers` (ours) and one of `body`, `chunks` of a stream, and `error`.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, OpenAI, Stream

Answer = dict[str, Any]


def run(plan: dict[str, Any]) -> list[Answer]:
    """One answer a case, in order."""
    client = OpenAI(base_url=plan["base_url"], api_key="none", max_retries=0)
    return [_answer(client, case) for case in plan["cases"]]


def _answer(client: OpenAI, case: dict[str, Any]) -> Answer:
    try:
        raw = _send(client, case)
        found = {"status": raw.status_code, "headers": _ours(raw.headers)}
        parsed = raw.parse()
        if isinstance(parsed, Stream):
            return found | {"chunks": [_plain(chunk) for chunk in parsed]}
        if case["call"] == "models.list":
            return found | {"body": [_plain(model) for model in parsed]}
        return found | {"body": _plain(parsed)}
    except APIStatusError as error:
        headers = _ours(error.response.headers)
        return {"status": error.status_code, "headers": headers, "error": error.body}
    except APIConnectionError:
        raise
    except APIError as error:  # in the middle of a stream
        return {"status": 200, "headers": {}, "error": error.body}


def _send(client: OpenAI, case: dict[str, Any]) -> Any:
    call, body = case["call"], case["body"]
    if call == "get":
        return client.get(body["path"], cast_to=object)  # raises: there is nothing to get
    if call == "models.list":
        return client.models.with_raw_response.list()
    if call == "models.retrieve":
        return client.models.with_raw_response.retrieve(body["model"])
    resource: Any = reduce(getattr, call.split("."), client)
    return resource.with_raw_response.create(**body, extra_body=case["extra"])


def _plain(answer: Any) -> Any:
    return answer.model_dump(mode="json", exclude_unset=True)


def _ours(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("x-raee-")}
