"""A label in the place of the token that stands for it: text, tokens, log-probabilities."""

import asyncio
from math import exp, log

import pytest
from vllm.exceptions import GenerationError
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from raee_serve.engine.settings import NO_LABEL, exit_args, probe_args
from raee_serve.server.label_answers import EXCLUDED, LabelAnswer, as_labels
from raee_serve.server.limits import AllowedLabels, Written

pytestmark = pytest.mark.unit

NAMES = ("card lost", "card stolen", "balance")
WRITTEN = (
    Written(" card lost", (40, 41)),
    Written(" card stolen", (40, 42, 43)),
    Written(" balance", (50,)),
)
ALL = AllowedLabels(NAMES, WRITTEN, "probe")
WITHOUT_STOLEN = AllowedLabels(NAMES, (WRITTEN[0], None, WRITTEN[2]), "probe")
P = (0.2, 0.7, 0.1)
ANY = -1


def answer(labels=ALL, **about):
    return LabelAnswer(labels, "set", "intents/3", **about)


def engine_output(token, told=0, n=1, reason="length"):
    """told: so many of the labels' log-probabilities, beside the sampled one's."""
    by_rank = sorted(range(3), key=lambda place: -P[place])
    entries = {}
    if token != NO_LABEL:
        entries[token] = Logprob(log(P[token - 1]), by_rank.index(token - 1) + 1)
    for rank, place in enumerate(by_rank[:told], 1):
        entries[place + 1] = Logprob(log(P[place]), rank)
    completions = [
        CompletionOutput(i, "", [token], 0.0, [entries], finish_reason=reason) for i in range(n)
    ]
    return RequestOutput("0", None, [1, 2], None, completions, True)


def rewritten(outputs, labels=ALL, num_logprobs=None, noted=None):
    async def engine():
        for output in outputs:
            yield output

    async def run():
        note = [].append if noted is None else noted.append
        return [o async for o in as_labels(engine(), answer(labels), num_logprobs, note)]

    return asyncio.run(run())


def test_a_label_is_text_and_tokens_and_ends_by_itself():
    for n in (1, 3):
        (output,) = rewritten([engine_output(2, n=n)])
        assert len(output.outputs) == n
        for completion in output.outputs:
            assert (completion.text, completion.token_ids) == (" card stolen", [40, 42, 43])
            assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
            assert completion.logprobs is None and completion.cumulative_logprob is None


@pytest.mark.parametrize(
    ("asked", "others"), [(0, []), (1, []), (2, [0]), (3, [0, 2]), (ANY, [0, 2])]
)
def test_the_labels_are_the_tokens_of_the_first_place(asked, others):
    (output,) = rewritten([engine_output(2, told=3)], num_logprobs=asked)
    first, *rest = output.outputs[0].logprobs
    assert next(iter(first)) == 40
    assert {entry.decoded_token: round(exp(entry.logprob), 6) for entry in first.values()} == {
        NAMES_TEXT[place]: P[place] for place in (1, *others)
    }
    assert [list(entry) for entry in rest] == [[42], [43]]
    assert all((e.logprob, e.decoded_token) == (0.0, "") for r in rest for e in r.values())
    tokens = output.outputs[0].token_ids
    told = zip(output.outputs[0].logprobs, tokens, strict=True)
    assert "".join(entry[token].decoded_token for entry, token in told) == " card stolen"
    assert output.outputs[0].cumulative_logprob == pytest.approx(log(0.7))


NAMES_TEXT = [label.text for label in WRITTEN]


def test_a_sampled_label_is_told_whatever_its_rank():
    (output,) = rewritten([engine_output(3, told=3)], num_logprobs=1)
    (first,) = output.outputs[0].logprobs
    assert [entry.decoded_token for entry in first.values()] == [" balance", " card stolen"]


def test_labels_that_begin_alike_have_keys_of_their_own():
    (output,) = rewritten([engine_output(1, told=3)], num_logprobs=3)
    first = output.outputs[0].logprobs[0]
    assert len(first) == 3 and len([key for key in first if key < 0]) == 1


def test_what_the_request_excludes_is_not_told():
    (output,) = rewritten([engine_output(1, told=3)], WITHOUT_STOLEN, num_logprobs=3)
    texts = [entry.decoded_token for entry in output.outputs[0].logprobs[0].values()]
    assert texts == [" card lost", " balance"]


def test_the_probabilities_are_noted_most_probable_first():
    noted = []
    (output,) = rewritten([engine_output(1, told=3)], noted=noted)
    assert output.outputs[0].logprobs is None  # the client asked for none
    assert list(noted[0]) == ["card stolen", "card lost", "balance"]
    assert list(noted[0].values()) == pytest.approx([0.7, 0.2, 0.1])


@pytest.mark.parametrize("labels", [ALL, WITHOUT_STOLEN])
def test_no_label_is_an_error_of_this_request(labels, caplog):
    token = NO_LABEL if labels is ALL else 2
    with pytest.raises(GenerationError, match="no label for this prompt"):
        rewritten([engine_output(token)], labels)
    assert "intents/3 of set" in caplog.text


def test_an_aborted_request_has_none():
    aborted = CompletionOutput(0, "", [], None, None, finish_reason="abort")
    (output,) = rewritten([RequestOutput("0", None, [1], None, [aborted], True)])
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("", "abort")


FILLED_IN = SamplingParams(
    n=1, temperature=0.7, top_p=0.9, top_k=2, min_p=0.1, seed=3, max_tokens=24, min_tokens=5,
    stop=["card"], stop_token_ids=[2], bad_words=["card"], presence_penalty=1.0,
    frequency_penalty=1.0, repetition_penalty=1.5, logit_bias={2: 100.0},
    allowed_token_ids=[7], structured_outputs=StructuredOutputsParams(choice=["x"]),
    logprobs=2, output_kind=RequestOutputKind.DELTA,
    extra_args={"mine": 1, **exit_args(9)},
)  # fmt: skip


def test_only_how_to_draw_is_the_clients():
    own = answer(scores=(0.5, 1.0, -1.0)).params(FILLED_IN, 3, 20)
    plain = SamplingParams(
        n=1, temperature=0.7, top_p=0.9, top_k=2, min_p=0.1, seed=3, max_tokens=1, ignore_eos=True,
        detokenize=False, logprobs=2, output_kind=RequestOutputKind.DELTA, watermarking=False,
        extra_args={"mine": 1, **probe_args(3, "set", "intents/3", [0.5, 1.0, -1.0])},
        skip_clone=True,
    )  # fmt: skip
    assert own == plain
    assert FILLED_IN.max_tokens == 24 and FILLED_IN.extra_args == {"mine": 1, **exit_args(9)}


def test_excluded_labels_are_pushed_out():
    bias = answer(WITHOUT_STOLEN).params(FILLED_IN, 3, 20).extra_args
    assert bias["raee_probe_bias"] == [0.0, EXCLUDED, 0.0]


def test_a_top_k_that_drops_no_label_is_none():
    for asked, expected in ((2, 2), (3, 0), (64, 0)):
        assert answer().params(SamplingParams(top_k=asked), 3, 20).top_k == expected


def test_without_a_temperature_the_most_probable_label_answers():
    stated = SamplingParams(temperature=0.7, top_k=64, seed=1)
    greedy = answer(is_greedy=True).params(stated, 3, 20)
    assert (greedy.temperature, greedy.top_k) == (0.0, 0)
    several = answer(is_greedy=True).params(SamplingParams(n=3, temperature=1.0), 3, 20)
    assert (several.n, several.temperature) == (3, 1.0)  # who wants several wants draws


@pytest.mark.parametrize(
    ("asked", "wants_all", "most", "expected"),
    [
        (None, False, 20, None),
        (0, False, 20, 0),
        (20, False, 20, 3),
        (-1, False, 20, 3),
        (2, True, 20, 3),
        (None, True, 2, 2),
        (None, True, -1, 3),
    ],
)
def test_no_more_is_asked_than_there_are_labels(asked, wants_all, most, expected):
    given = SamplingParams(logprobs=asked)
    assert answer(wants_all=wants_all).params(given, 3, most).logprobs == expected
