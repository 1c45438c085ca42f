"""Probe sets of a worker, and the logits of steps in which some rows leave through a probe."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams

from raee_serve.engine.probe_head import COLUMN_STEP, AskedProbe, ProbeBank, ProbeRows, asked_probe
from raee_serve.engine.settings import (
    EXIT_HEAD_KEY,
    EXIT_LAYER_KEY,
    NO_LABEL,
    PROBE_BIAS_KEY,
    PROBE_KEY,
    at_exit,
    exit_args,
    label_of,
    own_args,
    probe_args,
    with_own_args,
)
from raee_serve.errors import TableError
from raee_serve.exits.probes import Probe, packed

pytestmark = pytest.mark.unit

HIDDEN, VOCAB, NUM_LAYERS = 8, 100, 6
RNG = np.random.default_rng(0)
PROBES = {
    name: Probe(
        RNG.normal(size=(n, HIDDEN)).astype(np.float32), RNG.normal(size=n).astype(np.float32)
    )
    for name, n in {"two": 2, "five": 5}.items()
}
TWO = AskedProbe(("set", "two"), (0.5, -0.5))
FIVE = AskedProbe(("set", "five"), (0.0, 1.0, -1e9, 2.0, 3.0))
GONE = AskedProbe(("gone", "two"), (0.0, 0.0))


@pytest.fixture
def bank():
    bank = ProbeBank(HIDDEN, VOCAB, torch.device("cpu"))
    bank.load("set", packed(PROBES))
    return bank


def states(num_rows, dtype=torch.float32):
    return torch.from_numpy(RNG.normal(size=(num_rows, HIDDEN))).to(dtype)


def scores(asked, state):
    return PROBES[asked.probe[1]].scores(state.float().numpy()) + np.float32(asked.bias)


def assert_answers(row, asked, state):
    """`row` has the scores in its label columns, and nothing else."""
    num_labels = len(asked.bias)
    np.testing.assert_allclose(row[1 : 1 + num_labels], scores(asked, state), atol=1e-4)
    assert row[NO_LABEL] == -torch.inf and (row[1 + num_labels :] == -torch.inf).all()


def assert_no_answer(row):
    assert row.isfinite().nonzero().flatten().tolist() == [NO_LABEL]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_have_columns_of_their_own(bank, dtype):
    asked, hidden = [FIVE, TWO, GONE, FIVE, TWO], states(5, dtype)
    logits = bank.label_logits(hidden, asked)
    assert logits.dtype == torch.float32 and logits.shape == (5, COLUMN_STEP)
    for row in (0, 1, 3, 4):
        assert_answers(logits[row], asked[row], hidden[row])
    assert_no_answer(logits[2])


@pytest.mark.parametrize(
    ("columns", "width"), [(0, 64), (64, 64), (65, VOCAB), (VOCAB, VOCAB)], ids=str
)
def test_the_sampler_gets_the_columns_it_needs(bank, columns, width):
    rows = ProbeRows([TWO, FIVE], columns)
    assert bank.logits(states(2), rows, never).shape == (2, width)


def never(hidden_states):
    raise AssertionError("the LM head is touched")


@pytest.mark.parametrize("head_takes_all", [False, True])
def test_other_rows_are_the_lm_heads(bank, head_takes_all):
    weight, given = states(VOCAB), []

    def head(hidden_states):
        given.append(len(hidden_states))
        return (hidden_states @ weight.T).to(torch.bfloat16)

    hidden, asked = states(5), [None, FIVE, None, GONE, TWO]
    logits = bank.logits(hidden, ProbeRows(asked, VOCAB, head_takes_all), head)
    assert given == [5 if head_takes_all else 2]
    assert logits.dtype == torch.float32 and logits.shape == (5, VOCAB)
    assert torch.equal(logits[[0, 2]], head(hidden[[0, 2]]).float())
    for row in (1, 4):
        assert_answers(logits[row], asked[row], hidden[row])
    assert_no_answer(logits[3])


@pytest.mark.parametrize("head_takes_all", [False, True])
def test_a_rank_that_does_not_sample_has_no_logits(bank, head_takes_all):
    rows = ProbeRows([None, TWO], head_takes_all=head_takes_all)
    assert bank.logits(states(2), rows, lambda hidden_states: None) is None


@pytest.mark.parametrize(
    "asked",
    [
        AskedProbe(None),
        AskedProbe(("gone", "two"), (0.0, 0.0)),
        AskedProbe(("set", "three"), (0.0, 0.0)),
        AskedProbe(("set", "two"), (0.0,)),
        AskedProbe(("set", "two"), (0.0,) * 101),
        AskedProbe(("set", "two"), (float("nan"), 0.0)),
        AskedProbe(("set", "two"), (float("-inf"),) * 2),
        AskedProbe(("set", "two"), (float("inf"), 0.0)),
    ],
    ids=str,
)
def test_a_row_without_an_answer_says_so(bank, asked):
    hidden = states(2)
    logits = bank.label_logits(hidden, [asked, TWO])
    assert_no_answer(logits[0])
    assert_answers(logits[1], TWO, hidden[1])


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_a_state_that_is_no_number_has_no_answer(bank, spoilt):
    hidden = states(3)
    hidden[1, 2] = spoilt
    logits = bank.label_logits(hidden, [TWO, TWO, TWO])
    assert_no_answer(logits[1])
    assert_answers(logits[0], TWO, hidden[0])


def test_excluded_labels_are_never_best(bank):
    bias = (-1e9, -1e9, -1e9, -1e9, 0.0)
    logits = bank.label_logits(states(50), [AskedProbe(("set", "five"), bias)] * 50)
    assert set(logits.argmax(dim=1).tolist()) == {5}


def test_sets_are_held_side_by_side(bank):
    hidden, other = states(2), {"two": Probe(-PROBES["two"].weight, -PROBES["two"].bias)}
    bank.load("other", packed(other))
    plain = (0.0, 0.0)
    asked = [AskedProbe(("set", "two"), plain), AskedProbe(("other", "two"), plain)]
    logits = bank.label_logits(hidden[[0, 0]], asked)
    assert torch.allclose(logits[0, 1:3], -logits[1, 1:3])

    bank.unload("set")
    bank.unload("never there")
    after = bank.label_logits(hidden[[0, 0]], asked)
    assert_no_answer(after[0])
    assert torch.equal(after[1], logits[1])


def broken(weight=PROBES["two"].weight, bias=PROBES["two"].bias):
    return packed({"fine": PROBES["five"], "broken": Probe(weight, bias)})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"nothing of the kind", "cannot be read"),
        (broken(weight=np.zeros((2, HIDDEN + 1))), r"'broken' has a weight of shape \(2, 9\)"),
        (broken(weight=np.zeros((2, HIDDEN, 1))), "has a weight of shape"),
        (broken(bias=np.zeros(3)), r"a bias of shape \(3,\); allowed: \[labels, 8\]"),
        (broken(np.zeros((0, HIDDEN)), np.zeros(0)), r"has 0 labels; allowed: 1\.\.99"),
        (broken(np.zeros((VOCAB, HIDDEN)), np.zeros(VOCAB)), "has 100 labels"),
        (broken(bias=np.array([0.0, np.inf])), "not finite"),
    ],
)
def test_a_set_is_loaded_whole_or_not_at_all(bank, data, reason):
    hidden = states(1)
    for set_id in ("set", "new"):
        with pytest.raises(TableError, match=reason):
            bank.load(set_id, data)
    assert_answers(bank.label_logits(hidden, [TWO])[0], TWO, hidden[0])
    assert_no_answer(bank.label_logits(hidden, [AskedProbe(("new", "fine"), FIVE.bias)])[0])


def test_what_a_request_asks_for():
    args = probe_args(3, "set", "two", np.array([1, -1e9]))
    assert args[EXIT_LAYER_KEY] == 3 and args[EXIT_HEAD_KEY] == "probe"
    assert asked_probe(args, NUM_LAYERS) == AskedProbe(("set", "two"), (1.0, -1e9))
    assert asked_probe(probe_args(6, "set", "two", []), NUM_LAYERS).probe == ("set", "two")
    assert asked_probe(None, NUM_LAYERS) is None
    assert asked_probe({}, NUM_LAYERS) is None
    assert asked_probe(args | exit_args(3, "shortcut"), NUM_LAYERS) is None
    with pytest.raises(ValueError, match="exit layer is 0"):
        probe_args(0, "set", "two", [0.0])


@pytest.mark.parametrize(
    "changes",
    [
        {EXIT_LAYER_KEY: 7},
        {EXIT_LAYER_KEY: None},
        {PROBE_KEY: None},
        {PROBE_KEY: "ab"},
        {PROBE_KEY: ["set"]},
        {PROBE_KEY: ["set", 2]},
        {PROBE_BIAS_KEY: None},
        {PROBE_BIAS_KEY: "12"},
        {PROBE_BIAS_KEY: [0.0, "1"]},
    ],
    ids=str,
)
def test_what_cannot_be_read_has_no_answer(changes):
    """Not the LM head's either, whose tokens would be taken for labels."""
    args = probe_args(3, "set", "two", [0.0, 0.0]) | changes
    assert asked_probe(args, NUM_LAYERS) == AskedProbe(None)


def test_tokens_stand_for_labels():
    assert [label_of(token) for token in (NO_LABEL, 1, 2, 150)] == [None, 0, 1, 149]


def test_a_copy_has_own_arguments_of_ours_alone():
    shared = {"theirs": 1, "raee_other": 2}
    params = SamplingParams(extra_args=shared)
    args = probe_args(3, "set", "two", [0.0, 0.0])
    own = with_own_args(params, args)
    assert own.extra_args == {"theirs": 1, **args} and own_args(own) == args
    assert at_exit(own, 2, "plain").extra_args == {"theirs": 1, EXIT_LAYER_KEY: 2}
    assert params.extra_args is shared and shared == {"theirs": 1, "raee_other": 2}
    assert own_args(SamplingParams()) == {}
