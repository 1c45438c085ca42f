"""What the conformance tests tell apart, and what they leave out of account."""

import pytest

from tests.server.conformance.cases import cases
from tests.server.conformance.compare import differences, normal, shape

pytestmark = pytest.mark.unit


def chunk(content=None, finish=None, **more):
    delta = {} if content is None else {"content": content}
    return {"id": "c-0123456789", "choices": [{"index": 0, "delta": delta, **more}]} | (
        {"usage": None} if finish is None else {"usage": {"prompt_tokens": 3}}
    )


def body(text="red", logprob=-0.5, **more):
    choice = {"text": text, "logprobs": {"token_logprobs": [logprob]}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    return {"status": 200, "body": {"choices": [choice], "usage": usage, **more}}


def test_ids_times_and_noise_are_no_difference():
    one = body(id="cmpl-0123456789ab", created=5)
    other = body(id="cmpl-ba9876543210-0", created=6, logprob=-0.5001)
    assert differences(normal(one), normal(other)) == []


def test_a_number_may_be_written_without_its_fraction_but_counts_count():
    assert differences(normal(body(logprob=0)), normal(body(logprob=-0.001))) == []
    assert differences({"a": 0}, {"a": 1})


@pytest.mark.parametrize(
    "other",
    [
        body(text="green"),
        body(logprob=-0.6),
        body(raee={}),
        body() | {"status": 400},
        {"status": 200, "error": {"message": "no"}},
    ],
)
def test_everything_else_is(other):
    assert differences(normal(body()), normal(other))


def test_an_id_of_another_kind_and_a_models_name_are():
    assert differences(normal(body(id="cmpl-0123456789")), normal(body(id="chat-0123456789")))
    assert differences(normal(body(id="smollm2")), normal(body(id="gemma3")))


def test_a_stream_may_be_cut_anywhere():
    one = [chunk("re"), chunk("d"), chunk(finish=True)]
    other = [chunk("r"), chunk("e"), chunk("d"), chunk(finish=True)]
    one, other = (normal({"status": 200, "chunks": chunks}) for chunks in (one, other))
    assert differences(one, other) == []
    assert one["stream"]["choices"][0]["delta"]["content"] == "red"
    assert one["stream"]["usage"] == {"prompt_tokens": 3}


def test_a_stream_with_another_text_or_member_is_another():
    one = normal({"status": 200, "chunks": [chunk("red"), chunk(finish=True)]})
    for chunks in ([chunk("rot"), chunk(finish=True)], [chunk("red", x=1), chunk(finish=True)]):
        assert differences(one, normal({"status": 200, "chunks": chunks}))


def test_a_tool_call_in_pieces_is_one():
    def piece(**function):
        return chunk(tool_calls=[{"index": 0, "function": function}])

    chunks = [piece(name="f", arguments=""), piece(arguments='{"a"'), piece(arguments=": 1}")]
    whole = normal({"status": 200, "chunks": chunks})["stream"]["choices"][0]["tool_calls"]
    assert whole == [{"index": 0, "function": {"name": "f", "arguments": '{"a": 1}'}}]


def test_the_events_of_a_response_keep_their_order():
    events = [
        {"type": "a"},
        {"type": "d", "delta": "x"},
        {"type": "d", "delta": "y"},
        {"type": "e"},
    ]
    stream = normal({"status": 200, "chunks": events})["stream"]
    assert stream == [{"type": "a"}, {"type": "d", "delta": "xy"}, {"type": "e"}]


def test_a_shape_knows_no_texts_but_reasons_and_prompt_tokens():
    one = shape(normal(body()))
    assert differences(one, shape(normal(body(text="green", logprob=-3.0)))) == []
    assert differences(one, shape(normal(body(raee={}))))
    longer, called, more = body(), body(), body()
    longer["body"]["choices"][0]["finish_reason"] = "length"
    called["body"]["choices"][0]["finish_reason"] = "tool_calls"
    more["body"]["usage"]["prompt_tokens"] = 4
    assert differences(one, shape(normal(longer))) == []
    assert differences(one, shape(normal(called))) and differences(one, shape(normal(more)))


def test_a_shape_does_not_depend_on_which_tokens_were_best():
    one = {"logprobs": {"top_logprobs": [{" a": -1.0, " b": -2.0}]}}
    other = {"logprobs": {"top_logprobs": [{" c": -1.5, " d": -2.5}]}}
    assert differences(shape(one), shape(other)) == []


def test_every_kind_of_call_has_good_and_bad_cases():
    for call in ("chat.completions", "completions", "responses"):
        asked = [case for case in cases() if case.call == call]
        assert {case.is_error for case in asked} == {True, False}
        assert any(case.body.get("stream") for case in asked)
