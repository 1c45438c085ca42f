"""Which prompts may leave early: the task must be known and its output limited to its labels."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raee_serve.errors import RaeeError
from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.server.admission import Admission
from raee_serve.server.limits import LabelOutputs, OutputLimit, Written
from raee_serve.server.options import OptionError
from raee_serve.server.prompts import read_prompts
from raee_serve.tasks.prompts import ChatPrompt, CompletionPrompt
from raee_serve.tasks.task import Task

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
        label_task("intents", ("card lost", "card stolen"), "{text}\nIntent:"),
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
    "intents": (40, 40),
}
SECOND = {"trec": (22,), "intents": (41,)}
"""The further token of labels that have two."""


def outputs(task, ids, is_fitted):
    """Labels without the space are other tokens, 100 further on."""
    second = SECOND.get(task.name, ())
    own = [Written(t, (i, *second)) for t, i in zip(task.label_texts(), ids, strict=True)]
    bare = [Written(n, (i + 100,)) for n, i in zip(task.labels, ids, strict=True)]
    places = {label.text: place for labels in (bare, own) for place, label in enumerate(labels)}
    by_text = {label.text: label for label in (*bare, *own)}
    spellings = {text: (place, by_text[text]) for text, place in places.items()}
    plain = ids if len(set(ids)) == len(ids) else ()
    return LabelOutputs(task.labels, tuple(own), spellings, plain, is_fitted)


def labels(is_fitted=True):
    return {name: outputs(TASKS[name], ids, is_fitted) for name, ids in IDS.items()}


LABELS = labels()
ADMISSION = Admission(NUM_LAYERS, TASKS, LABELS, probe_set="set")
PLAIN = Admission(NUM_LAYERS, TASKS, labels(is_fitted=False))
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
        ({"prompt": "Gone\nIntent:", "raee": {"task": "intents"}}, ("intents",), "Gone"),
        ({"prompt": "Gone\nIntent:", "structured_outputs": {"choice": ["card lost"]}},
         ("intents",), "Gone"),
    ],
)  # fmt: skip
def test_known_and_limited_prompts_are_looked_up(body, candidates, key):
    assert only(body) == Lookup(candidates, key)
    if "intents" in candidates:  # its labels share a first token
        assert reason(body, admission=PLAIN) == Reason.UNCONSTRAINED
    else:
        head = None if candidates == ("xsum",) else "plain"
        assert only(body, admission=PLAIN) == Lookup(candidates, key, head=head)


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
        ({"prompt": "Fine. It was", **CHOICE, "allowed_token_ids": [10]}, Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", **CHOICE, "prompt_logprobs": 0}, Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", **CHOICE, "echo": True, "logprobs": 0}, Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", "echo": True, "max_tokens": 0, "raee": {"task": "sst2"}},
         Reason.UNCONSTRAINED),
        ({"prompt": "Fine. It was", "raee": {"task": "sst2"}, "response_format": {
            "type": "json_schema", "json_schema": {"schema": {"enum": list(TWO)}}}},
         Reason.UNCONSTRAINED),
        ({"prompt": "Gone\nIntent:", "allowed_token_ids": [40]}, Reason.UNCONSTRAINED),
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


def test_echo_alone_does_not_score_a_prompt():
    assert isinstance(only({"prompt": "Fine. It was", **CHOICE, "echo": True}), Lookup)


@pytest.mark.parametrize(("asked", "layer"), [(12, 12), ("full", NUM_LAYERS)])
def test_a_depth_that_was_asked_for_is_looked_up_for_a_probe_alone(asked, layer):
    body = {"prompt": ["Fine. It was", "other"], **CHOICE, "raee": {"exit_layer": asked}}
    expected = ExitDecision(layer, NUM_LAYERS, Reason.OVERRIDE)
    lookup = Lookup(("mr", "sst2"), "Fine.", exit_layer=layer)
    assert plan(body).entries == (lookup, expected)
    assert plan(body, admission=PLAIN).entries == (expected, expected)
    body["raee"]["head"] = "plain"
    assert plan(body).entries == (expected, expected)
    body["raee"]["head"] = "probe"
    with pytest.raises(OptionError, match="no probe can answer a prompt of this request") as caught:
        plan(body)
    assert caught.value.parameter == "raee.head" and "chat, intents, mr" in str(caught.value)


def test_a_probe_that_was_asked_for_is_not_an_adapters():
    admission = Admission(NUM_LAYERS, TASKS, LABELS, served_names=("base",))
    body = {"prompt": "x", "model": "tuned", "raee": {"task": "sst2", "exit_layer": 3}}
    decision = only(body, admission=admission)
    assert (decision.exit_layer, decision.head, decision.reason) == (3, "plain", Reason.OVERRIDE)
    assert plan(body, admission=admission).body["allowed_token_ids"] == [10, 11]


@pytest.mark.parametrize(
    ("raee", "allowed"),
    [
        ({"task": "intents", "head": "plain"}, "allowed for the task 'intents': probe"),
        ({"task": "sst2", "head": "shortcut", "exit_layer": 5}, "allowed for the task 'sst2': pr"),
        ({"task": "xsum", "head": "probe"}, "allowed for the task 'xsum': plain, shortcut"),
    ],
)
def test_a_head_that_the_named_task_does_not_have_is_refused(raee, allowed):
    admission = Admission(NUM_LAYERS, TASKS, LABELS, shortcut_layers=(5,))
    with pytest.raises(OptionError, match=allowed) as caught:
        admission.options({"raee": raee})
    assert caught.value.parameter == "raee.head"
    with pytest.raises(OptionError, match="allowed for the task 'sst2': plain"):
        PLAIN.options({"raee": {"task": "sst2", "head": "probe"}})


def test_a_servers_head_is_to_be_every_tasks():
    with pytest.raises(RaeeError, match="--head is plain; allowed for the task 'intents': probe"):
        Admission(NUM_LAYERS, TASKS, LABELS, head="plain").check_heads()
    Admission(NUM_LAYERS, TASKS, LABELS, head="probe").check_heads()
    ADMISSION.check_heads()


def test_a_fixed_depth_holds_for_all_but_those_who_ask():
    fixed = Admission(NUM_LAYERS, fixed_layer=7)
    assert only({"prompt": "x"}, admission=fixed).exit_layer == 7
    assert only({"prompt": "x", "raee": {"exit_layer": "auto"}}, admission=fixed).exit_layer == 7
    assert only({"prompt": "x", "raee": {"exit_layer": 9}}, admission=fixed).exit_layer == 9


FILLED_IN = {
    "max_tokens": 24, "max_completion_tokens": 9, "min_tokens": 5, "stop": ["\n"],
    "stop_token_ids": [3], "bad_words": ["great"], "ignore_eos": True,
}  # fmt: skip


@pytest.mark.parametrize("filled_in", [{}, FILLED_IN])
def test_naming_a_label_task_makes_one_label_the_answer_at_any_depth(filled_in):
    for extra in ({}, {"exit_layer": "full"}):
        named = {"prompt": "Fine", "raee": {"task": "sst2", **extra}, **filled_in}
        planned = plan(named)
        assert planned.body == {"prompt": "Fine", "max_tokens": 1}
        assert planned.alone == "sst2/alone"
        assert planned.labels["sst2"].written == LABELS["sst2"].own
        imposed = plan(named, admission=PLAIN)
        assert imposed.body == {"prompt": "Fine", "allowed_token_ids": [10, 11], "max_tokens": 1}
        assert imposed.alone is None


def test_a_clients_own_limit_stands():
    own = {"prompt": "Fine", **CHOICE, "max_tokens": 3}
    assert plan({**own, "raee": {"task": "sst2"}}).body == own | {"max_tokens": 1}
    assert plan({**own, "raee": {"task": "sst2"}}, admission=PLAIN).body == own
    recognised = plan({**own, "prompt": "Fine. It was"})
    assert recognised.body == own | {"prompt": "Fine. It was"} and recognised.alone is None


def test_through_the_lm_head_labels_of_several_tokens_are_limited_by_a_choice():
    body = plan(
        {"prompt": "Who?", "logit_bias": {"21": 3.0, "5": -1}, "raee": {"task": "trec"}},
        admission=PLAIN,
    ).body
    assert body["structured_outputs"] == {"choice": [" entity", " person"]}
    assert body["logit_bias"] == {"20": 97.0, "21": 100.0, "5": -1}
    assert body["max_tokens"] > len(" entity")


def written(task, limit):
    allowed = LABELS[task].under(OutputLimit.of(limit), "probe")
    return allowed and [label and label.text for label in allowed.written]


@pytest.mark.parametrize(
    ("task", "limit", "expected"),
    [
        ("sst2", {}, [" terrible", " great"]),
        ("sst2", CHOICE, [" terrible", "great"]),
        ("sst2", {"structured_outputs": {"choice": ["great", " great"]}}, [None, " great"]),
        ("sst2", {"structured_outputs": {"choice": ["great", "great"]}}, [None, "great"]),
        ("sst5", CHOICE, [" terrible", None, None, None, "great"]),
        ("trec", CHOICE, None),
        ("sst2", {"allowed_token_ids": [11]}, [None, " great"]),
        ("sst2", {"allowed_token_ids": [111]}, None),
        ("intents", {"allowed_token_ids": [40]}, None),
        ("chat", {"structured_outputs": {"choice": ["positive"]}}, [None, "positive"]),
        ("sst2", {"structured_outputs": {"regex": "great"}}, None),
    ],
)
def test_labels_are_written_as_the_client_asks(task, limit, expected):
    assert written(task, limit) == expected


def test_only_a_grammar_is_steered_to_first_tokens():
    by_choice = plan({"prompt": "Fine. It was", **CHOICE})
    assert by_choice.is_choice and by_choice.labels["sst2"].first_tokens == (10, 111)
    assert by_choice.labels["sst5"].first_tokens == (10, 111)
    assert not plan({"prompt": "Fine. It was", "allowed_token_ids": [10, 11]}).is_choice
    assert plan({"prompt": "x", "structured_outputs": {"choice": ["fine"]}}).labels == {}
    assert plan({"prompt": "Fine. It was"}).labels == {}


def test_tasks_are_searched_together_where_they_have_labels_and_head_in_common():
    mixed = Admission(NUM_LAYERS, TASKS, LABELS | {"mr": labels(is_fitted=False)["mr"]})
    body = {"prompt": "Fine. It was", **CHOICE}
    assert only(body, admission=mixed) == Lookup(("mr",), "Fine.", head="plain")
    assert only({**body, "raee": {"head": "probe"}}, admission=mixed) == Lookup(("sst2",), "Fine.")


def test_a_stated_temperature_is_the_clients():
    assert plan({"prompt": "x", "raee": {"task": "sst2"}}).is_greedy
    assert not plan({"prompt": "x", "raee": {"task": "sst2"}, "temperature": 0.7}).is_greedy


def test_server_defaults_yield_to_the_request():
    admission = Admission(NUM_LAYERS, TASKS, LABELS, k=5, head="plain")
    body = {"prompt": "x", "raee": {"task": "sst2"}}
    assert only(body, admission=admission) == Lookup(("sst2",), "x", 5, "plain")
    body["raee"] |= {"k": 7, "head": "probe", "budget": 0.9}
    assert only(body, admission=admission) == Lookup(("sst2",), "x", 7, budget=0.9)


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
    "tools", "chat_template", "truncate_prompt_tokens", "use_beam_search", "echo", "logprobs",
    "prompt_logprobs", "temperature", "tool_choice",
)  # fmt: skip


@settings(deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), json_values),
    prompt=json_values | st.just("Fine. It was"),
    messages=json_values
    | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), json_values)),
    named=st.sampled_from([None, "sst2", "trec", "xsum", "intents"]),
    admission=st.sampled_from([ADMISSION, PLAIN]),
)
def test_nothing_a_client_sends_raises(fields, prompt, messages, named, admission):
    body = {**fields, "prompt": prompt, "messages": messages, "raee": {"task": named}}
    for kind in ("completions", "chat"):
        if (prompts := read_prompts(kind, body)) is not None:
            texts = [None if isinstance(p, tuple) else p for p in prompts]
            planned = admission.plan(kind, body, admission.options(body), texts)
            assert len(planned.entries) == len(prompts)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_tool_that_must_be_called_takes_the_place_of_label_words(choice):
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": choice}
    messages = [{"role": "user", "content": "Rate: fine"}]
    named = {"messages": messages, "raee": {"task": "chat"}, **tools}
    assert reason(named, kind="chat") == Reason.UNCONSTRAINED
    assert plan(named, kind="chat").body == {"messages": messages, **tools}
    assert reason({**named, **CHOICE}, kind="chat") == Reason.UNCONSTRAINED
