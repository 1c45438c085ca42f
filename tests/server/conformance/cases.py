"""What is asked of vanilla vLLM and of raee-serve, once for the clients in every language."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an SDK.

    call: as the SDKs name it, or "get" for a plain GET of `body["path"]`.
    extra: of the body, what only vLLM knows; in Python it goes into `extra_body`.
    task: of the table, which then decides the prompts where there is no `raee` object; "" for none.
    is_error: the answer is to be a 4xx.
    """

    name: str
    call: str
    body: Body
    extra: Body = field(default_factory=dict)
    task: str = ""
    is_error: bool = False

    @property
    def takes_raee(self) -> bool:
        return self.call not in ("models.list", "models.retrieve", "get")

    @property
    def is_admitted(self) -> bool:
        """Whether a depth is decided, and stated in the headers."""
        return self.call in ("chat.completions", "completions")


TOKENS = 4
STREAM: Body = {"stream": True}
COUNTED: Body = {**STREAM, "stream_options": {"include_usage": True}}
GREEDY: Body = {"temperature": 0}
SEEDED: Body = {"temperature": 0.8, "seed": 7}
ON: Body = {"ignore_eos": True}
"""Every depth generates as many tokens."""
CITY: Body = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Body = {"name": "get_weather", "description": "The weather.", "parameters": CITY}
TOOLS: Body = {"tools": [{"type": "function", "function": WEATHER}]}
NAMED: Body = {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
CALL = r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "Rome"\}\}\n</tool_call>'
REVIEW = "Is this review negative or positive? Answer with one word.\n\nReview: A fine film."
SCORED: Body = {**ON, "prompt_logprobs": 1, "return_token_ids": True}
RED = {"structured_outputs": {"choice": ["red, blue"]}}
SCHEMA: Body = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}


def cases() -> list[Case]:
    """All of them, names unique."""
    wrong = [replace(case, is_error=True) for case in errors()]
    found = [*chats(), *completions(), *label_words(), *responses(), *wrong, *lists()]
    assert len({case.name for case in found}) == len(found)
    return found


def chat(name: str, body: Body, extra: Body | None = None, task: str = "") -> Case:
    """Of one greedy message, unless the body says otherwise."""
    messages = [{"role": "user", "content": "Name a colour."}]
    whole = {"messages": messages, "max_tokens": TOKENS, **GREEDY, **body}
    return Case(f"chat: {name}", "chat.completions", whole, extra or {}, task)


def chats() -> Iterator[Case]:
    yield chat("plain", {}, ON)
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Name a colour."}]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Another."},
    ]
    yield chat("history, content in parts", {"messages": history}, ON)
    yield chat("stream", STREAM, ON)
    yield chat("stream, usage at its end", COUNTED, ON)
    continuous = {"include_usage": True, "continuous_usage_stats": True}
    yield chat("stream, usage all along", {**STREAM, "stream_options": continuous}, ON)
    yield chat("n", {**SEEDED, "n": 2}, ON)
    yield chat("n, stream", {**SEEDED, **COUNTED, "n": 2}, ON)
    yield chat("seed", SEEDED, ON)
    yield chat("logprobs", {"logprobs": True, "top_logprobs": 2}, ON)
    yield chat("logprobs, stream", {**STREAM, "logprobs": True, "top_logprobs": 2}, ON)
    yield chat("prompt logprobs, token ids", {}, SCORED)
    yield chat("logit bias", {"logit_bias": {"2600": 100}}, ON)
    yield chat("stop", {"stop": [","], "max_tokens": 16}, RED)
    yield chat("stop, kept", {"stop": ","}, {**RED, "include_stop_str_in_output": True})
    yield chat("stop, stream", {**STREAM, "stop": [","]}, RED)
    yield chat("max_completion_tokens", {"max_tokens": None, "max_completion_tokens": 2}, ON)
    yield chat("penalties", {"presence_penalty": 1, "frequency_penalty": 1}, ON)
    wide = {"max_tokens": 48}
    yield chat("choice", wide, {"structured_outputs": {"choice": ["red", "green"]}})
    yield chat("regex", wide, {"structured_outputs": {"regex": "[ab]{3}"}})
    yield chat("json", wide | {"response_format": SCHEMA})
    yield chat("json, stream", wide | STREAM | {"response_format": SCHEMA})
    yield chat("tool named", wide | TOOLS | NAMED)
    yield chat("tool named, stream", wide | COUNTED | TOOLS | NAMED)
    yield chat("tool required", wide | TOOLS | {"tool_choice": "required"})
    yield chat("tool required, stream", wide | STREAM | TOOLS | {"tool_choice": "required"})
    said, wide = {"structured_outputs": {"regex": CALL}}, {"max_tokens": 64}
    yield chat("tool auto", wide | TOOLS | {"tool_choice": "auto"}, said)
    yield chat("tool auto, stream", wide | STREAM | TOOLS | {"tool_choice": "auto"}, said)
    yield chat("tool none", TOOLS | {"tool_choice": "none"}, ON)
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    answered = [
        {"role": "user", "content": "The weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny."},
    ]
    yield chat("tool answered", {"messages": answered, **TOOLS, "tool_choice": "none"}, ON)


def complete(name: str, body: Body, extra: Body | None = None, task: str = "") -> Case:
    """Of one greedy prompt, unless the body says otherwise."""
    whole = {"prompt": "Once upon a time", "max_tokens": TOKENS, **GREEDY, **body}
    return Case(f"completion: {name}", "completions", whole, extra or {}, task)


def completions() -> Iterator[Case]:
    several: Body = {"prompt": ["Once upon a time", "The sea is", "Two and two"]}
    yield complete("plain", {}, ON)
    yield complete("batch", several, ON)
    yield complete("token ids", {"prompt": [504, 3575, 314]}, ON)
    yield complete("batch of token ids", {"prompt": [[504, 3575, 314], [504, 2262]]}, ON)
    yield complete("stream", STREAM, ON)
    yield complete("batch, stream, usage", {**several, **COUNTED}, ON)
    yield complete("n", {**SEEDED, "n": 2}, ON)
    yield complete("batch, n", {**several, **SEEDED, "n": 2}, ON)
    yield complete("logprobs", {"logprobs": 2}, ON)
    yield complete("logprobs, stream", {**STREAM, "logprobs": 2}, ON)
    yield complete("echo", {"echo": True}, ON)
    yield complete("echo, logprobs", {"echo": True, "logprobs": 1}, ON)
    yield complete("echo, nothing generated", {"echo": True, "logprobs": 1, "max_tokens": 0})
    yield complete("echo, stream", {**STREAM, "echo": True}, ON)
    yield complete("prompt logprobs, token ids", {}, SCORED)
    yield complete("logit bias", {"logit_bias": {"2600": 100}}, ON)
    yield complete("seed", SEEDED, ON)
    yield complete("stop", {"stop": [","], "max_tokens": 16}, RED)
    yield complete("choice", {}, {"structured_outputs": {"choice": [" red", " green"]}})
    yield complete("regex", {"max_tokens": 16}, {"structured_outputs": {"regex": "[ab]{3}"}})
    yield complete("json", {"max_tokens": 32}, {"structured_outputs": {"json": CITY}})
    yield complete("allowed tokens", {}, {**ON, "allowed_token_ids": [504, 2262]})
    yield complete("beams", {"n": 2}, {"use_beam_search": True})


def label_words() -> Iterator[Case]:
    """What the table decides: the output is limited to a task's label words."""
    words = {"structured_outputs": {"choice": [" terrible", " great"]}}
    prompts = ["A fine film. It was", "The soup was cold. It was"]
    one: Body = {"prompt": prompts[0]}
    task = "demo_sentiment"
    yield complete("label word", {**one, "logprobs": 2}, words, task)
    yield complete("label words of a batch", {"prompt": prompts}, words, task)
    yield complete("label word, stream", {**one, **COUNTED}, words, task)
    yield complete("label word, n", {**one, **SEEDED, "n": 2}, words, task)
    review: Body = {"messages": [{"role": "user", "content": REVIEW}]}
    words = {"structured_outputs": {"choice": ["negative", "positive"]}}
    yield chat("label word", review, words, "demo_chat_sentiment")
    yield chat("label word, stream", {**review, **STREAM}, words, "demo_chat_sentiment")


def respond(name: str, body: Body, extra: Body | None = None) -> Case:
    whole = {"input": "Name a colour.", "max_output_tokens": TOKENS, **GREEDY, **body}
    return Case(f"response: {name}", "responses", whole, extra or {})


def responses() -> Iterator[Case]:
    yield respond("plain", {})
    yield respond("stream", STREAM)
    turns = [{"role": "user", "content": "Name a colour."}]
    yield respond("instructions", {"input": turns, "instructions": "Be brief."})
    text = {"format": {"type": "json_schema", "name": "city", "schema": CITY}}
    yield respond("json", {"text": text, "max_output_tokens": 32})
    tools: Body = {"tools": [{"type": "function", **WEATHER}], "max_output_tokens": 48}
    yield respond("tool required", {**tools, "tool_choice": "required"})


def errors() -> Iterator[Case]:
    for call, ask in (("chat", chat), ("completion", complete), ("response", respond)):
        yield ask(f"unknown model ({call})", {"model": "nobody"})
        yield ask("temperature below 0", {"temperature": -1})
    yield respond("no tokens wanted", {"max_output_tokens": -1})
    yield respond("after an unknown one", {"previous_response_id": "resp_none"})
    for name, body in {
        "max_tokens below 1": {"max_tokens": -1},
        "n of 0": {"n": 0},
        "too many logprobs": {"logprobs": True, "top_logprobs": 1000},
        "top_logprobs without logprobs": {"top_logprobs": 2},
        "no messages": {"messages": []},
        "messages of another type": {"messages": "hello"},
        "no such role": {"messages": [{"content": "hello"}]},
        "stream options without stream": {"stream_options": {"include_usage": True}},
        "no such format": {"response_format": {"type": "poem"}},
        "no such schema": {"response_format": {"type": "json_schema"}},
        "tool choice without tools": NAMED,
        "another tool than given": {
            **TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "other"}},
        },
        "bias for a token beyond the vocabulary": {"logit_bias": {"9999999": 1}},
        "bias that is no number": {"logit_bias": {"5": "much"}},
        "seed that is no number": {"seed": "seven"},
    }.items():
        yield chat(name, body)
    for name, body in {
        "max_tokens below 0": {"max_tokens": -1},
        "n of 0": {"n": 0},
        "too many logprobs": {"logprobs": 1000},
        "no prompt": {"prompt": None},
        "empty prompt": {"prompt": ""},
        "empty batch": {"prompt": []},
        "prompt of another type": {"prompt": {"text": "hello"}},
        "token beyond the vocabulary": {"prompt": [9999999]},
        "prompt longer than the model": {"prompt": [504] * 9000},
        "suffix": {"suffix": "the end"},
        "echo of a stream's logprobs": {**STREAM, "echo": True, "logprobs": 1000},
    }.items():
        yield complete(name, body)
    both = {"structured_outputs": {"choice": ["a"], "regex": "b"}}
    yield complete("two structures", {}, both)
    yield complete("not a regex", {}, {"structured_outputs": {"regex": "("}})
    yield complete("not a schema", {}, {"structured_outputs": {"json": {"type": "poem"}}})
    yield Case("no such route", "get", {"path": "/nothing"})
    yield Case("no such method", "get", {"path": "/chat/completions"})
    yield Case("no such model", "models.retrieve", {"model": "nobody"})


def lists() -> Iterator[Case]:
    yield Case("models", "models.list", {})
