"""Which prompts may leave early: the task must be known and its output limited to its labels."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.server.admission import Admission
from raee_serve.server.limits import LabelOutputs, OutputLimit
from raee_serve.server.prompts import read_prompts
from raee_serve.table.prompts import ChatPrompt, CompletionPrompt
from raee_serve.table.task import Task

pytestmark = pytest.mark.unit

NUM_LAYERS = 30
TWO = ("terrible", "great")
FIVE = ("terrible", "bad", "okay", "good", "great")


def label_task(name, words, template="{text} It was"):
    return Task(name, CompletionPrompt(template), words)


TASKS = {
    task.name: task
    for task in (
        label_task("mr", TWO),
        label_task("sst2", TWO),
        label_task("sst5", FIVE),
        label_task("trec", ("entity", "person"), "{text} The answer is a"),
        Task("chat", ChatPrompt("Rate: {text}"), ("negative", "positive")),
        Task("xsum", CompletionPrompt("{text}\nTL;DR:")),
    )
}
IDS = {
    "mr": (10, 11),
    "sst2": (10, 11),
    "sst5": (10, 12, 13, 14, 11),
    "trec": (20, 21),
    "chat": (30, 31),
}


def outputs(task, ids):
    """Label words without the space are other tokens, 100 further on."""
    bare = {word: id + 100 for word, id in zip(task.label_words, ids, strict=True)}
    texts = dict(zip(task.label_texts(), ids, strict=True))
    single_token = task.name != "trec"
    return LabelOutputs(task.label_words, task.label_texts(), ids, single_token, bare | texts)


LABELS = {name: outputs(TASKS[name], ids) for name, ids in IDS.items()}
ADMISSION = Admission(NUM_LAYERS, TASKS, LABELS)
CHOICE = {"structured_outputs": {"choice": [" terrible", "great"]}}


def plan(body, kind="completions", admission=ADMISSION):
    prompts = [p if not isinstance(p, tuple) else None for p in read_prompts(kind, body)]
    return admission.plan(kind, body, admission.options(body), prompts)


def only(body, **kwargs):
    (entry,) = plan(body, **kwargs).entries
    return entry


def reason(body, **kwargs):
    entry = only(body, **kwargs)
    assert isinstance(entry, ExitDecision)
    assert entry.is_full or entry.reason == Reason.OVERRIDE
    return entry.reason


@pytest.mark.parametrize(
    ("body", "candidates", "key"),
    [
        ({"prompt": "Fine. It was", **CHOICE}, ("mr", "sst2"), "Fine."),
        ({"prompt": "Fine. It was", "allowed_token_ids": [11, 10]}, ("mr", "sst2"), "Fine."),
        (
            {"prompt": "Fine. It was", "structured_outputs": {"choice": ["good"]}},
            ("sst5",),
            "Fine.",
        ),
        ({"prompt": "Fine. It was", "allowed_token_ids": [11]}, ("mr", "sst2"), "Fine."),
        ({"prompt": " Long news.\nTL;DR:"}, ("xsum",), "Long news."),
        ({"prompt": "Fine. It was", "raee": {"task": "sst2"}}, ("sst2",), "Fine."),
        ({"prompt": "Free words", "raee": {"task": "sst2"}}, ("sst2",), "Free words"),
        ({"prompt": "Who? The answer is a", "raee": {"task": "trec"}}, ("trec",), "Who?"),
    ],
)
def test_known_and_limited_prompts_are_looked_up(body, candidates, key):
    assert only(body) == Lookup(candidates, key)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "Fine. It was"}, Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", "structured_outputs": {"choice": ["great", "fine"]}},
         Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", "structured_outputs": {"choice": []}}, Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", "allowed_token_ids": [10, 99]}, Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", "allowed_token_ids": []}, Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", "guided_choice": list(TWO)}, Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", **CHOICE, "response_format": {"type": "json_object"}},
         Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", **CHOICE, "use_beam_search": True}, Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", "raee": {"task": "sst2"},
          "structured_outputs": {"regex": ".*"}}, Reason.UNCONSTRAINED),
        ({"prompt": "Something else", **CHOICE}, Reason.UNMATCHED),
        ({"prompt": " It was", **CHOICE}, Reason.UNMATCHED),
        ({"prompt": ""}, Reason.UNMATCHED),
        ({"prompt": "", "raee": {"task": "sst2"}}, Reason.UNMATCHED),
        ({"prompt": "Fine. It was", **CHOICE, "truncate_prompt_tokens": 2}, Reason.UNMATCHED),
        ({"prompt": "Fine. It was", **CHOICE, "add_special_tokens": False}, Reason.UNMATCHED),
        ({"prompt": "", "prompt_embeds": ["aGk="]}, Reason.UNMATCHED),
        ({"prompt": "\ud800 It was", **CHOICE}, Reason.ERROR),
    ],
)  # fmt: skip
def test_everything_doubtful_runs_at_full_depth(body, expected):
    assert reason(body) == expected


def test_a_chat_matches_by_its_only_user_message():
    limit = {"structured_outputs": {"choice": ["negative", "positive"]}}
    parts = [{"type": "text", "text": "Rate: fine"}]
    for content in ("Rate: fine", parts):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": content},
        ]
        assert only({"messages": messages, **limit}, kind="chat") == Lookup(("chat",), "fine")
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    assert reason({"messages": messages, **limit, **tools}, kind="chat") == Reason.UNMATCHED
    turns = [*messages, {"role": "assistant", "content": "ok"}, messages[-1]]
    assert reason({"messages": turns, **limit}, kind="chat") == Reason.UNMATCHED
    named = {"messages": turns, "raee": {"task": "chat"}}
    assert reason(named, kind="chat") == Reason.UNMATCHED


@pytest.mark.parametrize(
    ("model", "is_adapter"), [("base", False), ("", False), ("tuned", True), (["x"], False)]
)
def test_an_adapter_is_not_looked_up(model, is_adapter):
    body = {"prompt": "Fine. It was", **CHOICE, "model": model}
    admission = Admission(NUM_LAYERS, TASKS, LABELS, served_names=("base",))
    [entry] = plan(body, admission=admission).entries
    assert (entry == ExitDecision.full(NUM_LAYERS, Reason.ADAPTER)) is is_adapter
    assert isinstance(entry, Lookup) is not is_adapter


@pytest.mark.parametrize(("asked", "layer"), [(12, 12), ("full", NUM_LAYERS)])
def test_an_override_needs_no_look_up(asked, layer):
    body = {"prompt": ["Fine. It was", "other"], **CHOICE, "raee": {"exit_layer": asked}}
    expected = ExitDecision(layer, NUM_LAYERS, Reason.OVERRIDE)
    assert plan(body).entries == (expected, expected)


def test_a_fixed_depth_holds_for_all_but_those_who_ask():
    fixed = Admission(NUM_LAYERS, fixed_layer=7)
    assert only({"prompt": "x"}, admission=fixed).exit_layer == 7
    assert only({"prompt": "x", "raee": {"exit_layer": "auto"}}, admission=fixed).exit_layer == 7
    assert only({"prompt": "x", "raee": {"exit_layer": 9}}, admission=fixed).exit_layer == 9


def test_naming_a_label_task_limits_the_output_at_any_depth():
    for extra in ({}, {"exit_layer": "full"}):
        body = plan({"prompt": "Fine", "raee": {"task": "sst2", **extra}}).body
        assert body == {"prompt": "Fine", "allowed_token_ids": [10, 11], "max_tokens": 1}
    own = {"prompt": "Fine", **CHOICE, "max_tokens": 3}
    assert plan({**own, "raee": {"task": "sst2"}}).body == own


def test_labels_of_several_tokens_are_limited_by_choice_and_a_bias_on_their_first_tokens():
    body = plan(
        {"prompt": "Who?", "logit_bias": {"21": 3.0, "5": -1}, "raee": {"task": "trec"}}
    ).body
    assert body["structured_outputs"] == {"choice": [" entity", " person"]}
    assert body["logit_bias"] == {"20": 97.0, "21": 100.0, "5": -1}
    assert body["max_tokens"] > len(" entity")


def test_choices_are_to_begin_with_the_tokens_that_the_table_knows():
    limit = {"structured_outputs": {"choice": [" terrible", "great"]}}
    by_choice = plan({"prompt": "Fine. It was", **limit})
    assert by_choice.is_choice
    assert by_choice.label_tokens["sst2"] == ((10,), (111,))
    assert by_choice.label_tokens["sst5"] == ((10,), (), (), (), (111,))
    by_ids = plan({"prompt": "Fine. It was", "allowed_token_ids": [10, 11]})
    assert not by_ids.is_choice
    assert by_ids.label_tokens["sst2"] == ((10,), (11,))
    assert plan({"prompt": "x", "structured_outputs": {"choice": ["fine"]}}).label_tokens == {}


def test_server_defaults_yield_to_the_request():
    admission = Admission(NUM_LAYERS, TASKS, LABELS, k=5, rule="published")
    body = {"prompt": "x", "raee": {"task": "sst2"}}
    assert only(body, admission=admission) == Lookup(("sst2",), "x", 5, "published")
    body["raee"] |= {"k": 7, "rule": "earliest"}
    assert only(body, admission=admission) == Lookup(("sst2",), "x", 7, "earliest")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("completions", {}),
        ("completions", {"prompt": None}),
        ("completions", {"prompt": []}),
        ("completions", {"prompt": [[]]}),
        ("completions", {"prompt": ["a", 1]}),
        ("completions", {"prompt": [True]}),
        ("completions", {"prompt": [-1]}),
        ("completions", {"prompt": {"text": "a"}}),
        ("chat", {"messages": "hello"}),
        ("chat", {"messages": []}),
        ("chat", {"messages": ["hello"]}),
    ],
)
def test_malformed_prompts_are_left_to_vllm(kind, body):
    assert read_prompts(kind, body) is None


def test_prompts_come_in_order():
    assert read_prompts("completions", {"prompt": ["a", "b"]}) == ["a", "b"]
    assert read_prompts("completions", {"prompt": [1, 2]}) == [(1, 2)]
    assert read_prompts("completions", {"prompt": [[1], [2, 3]]}) == [(1,), (2, 3)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
messages_like = st.dictionaries(st.sampled_from(["role", "content"]), json_values)
FIELDS = (
    "structured_outputs", "allowed_token_ids", "response_format", "logit_bias", "max_tokens",
    "tools", "chat_template", "truncate_prompt_tokens", "use_beam_search",
)  # fmt: skip


@settings(deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), json_values),
    prompt=json_values | st.just("Fine. It was"),
    messages=json_values
    | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), json_values)),
    named=st.sampled_from([None, "sst2", "trec", "xsum"]),
)
def test_nothing_a_client_sends_raises(fields, prompt, messages, named):
    body = {**fields, "prompt": prompt, "messages": messages, "raee": {"task": named}}
    for kind in ("completions", "chat"):
        if (prompts := read_prompts(kind, body)) is not None:
            texts = [None if isinstance(p, tuple) else p for p in prompts]
            planned = ADMISSION.plan(kind, body, ADMISSION.options(body), texts)
            assert len(planned.entries) == len(prompts)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_tool_that_must_be_called_takes_the_place_of_label_words(choice):
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": choice}
    messages = [{"role": "user", "content": "Rate: fine"}]
    named = {"messages": messages, "raee": {"task": "chat"}, **tools}
    assert reason(named, kind="chat") == Reason.UNCONSTRAINED
    assert plan(named, kind="chat").body == {"messages": messages, **tools}
    assert reason({**named, **CHOICE}, kind="chat") == Reason.UNCONSTRAINED


def test_two_spellings_that_begin_alike_are_one_token():
    spellings = {spelling: 7 for word in TWO for spelling in (word, f" {word}")}
    label = replace(LABELS["sst2"], spellings=spellings)
    limit = OutputLimit.of({"structured_outputs": {"choice": list(spellings)}})
    assert label.tokens_under(limit) == ((7,), (7,))
