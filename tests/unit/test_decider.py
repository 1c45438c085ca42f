"""Decisions from rows that are made up: which task, which rule, which probe, what it is told."""

import numpy as np
import pytest

from raee_serve.errors import RaeeError
from raee_serve.exits.choice import Choice
from raee_serve.exits.neighbours import VOTERS, evidence_weights, log_votes
from raee_serve.exits.probes import Probe
from raee_serve.exits.rule import expected, published
from raee_serve.records import Reason
from raee_serve.retrieval.decider import ExitDecider
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.search import InMemorySearch
from raee_serve.retrieval.task_index import FAR_NEIGHBOURS, MIN_BOUND, TaskIndex
from raee_serve.table.schema import TableMetadata, TaskEntry
from raee_serve.tasks.registry import get_task
from tests.unit.table_rows import (
    BACKBONE,
    ENCODER,
    LAYERS,
    entry,
    made_fit,
    row_ids,
    unit_vectors,
)

pytestmark = pytest.mark.unit

N, DIMENSION = 40, ENCODER.dimension


def index_of(evidence, *, layers=LAYERS, plain=None, has_fit=True, seed=0, **parts):
    """A label task. evidence: [n, layers], in 0..1, of its probes; plain: [n, 4], of the plain
    head, by default right at layer 3 alone. parts: of the fit."""
    n = len(evidence)
    vectors = unit_vectors(n, DIMENSION, seed)
    fit = made_fit(row_ids(n, str(seed)), evidence, layers=layers, dimension=DIMENSION, **parts)
    by_layer = np.zeros((n, 1, 4), np.float32)
    if has_fit:
        by_layer[:, 0, np.array(layers) - 1] = evidence
    golds = (np.arange(n) % 2).astype(np.int32)
    return TaskIndex(
        list(fit.ids),
        vectors,
        np.empty(0, np.uint64),
        ("probe",) if has_fit else ("plain",),
        by_layer,
        np.tile([0, 0, 0.9, 0], (n, 1)).astype(np.float32) if plain is None else plain,
        golds,
        np.bincount(golds, minlength=2),
        fit.certainties if has_fit else np.zeros(n, np.float32),
        2.0,
        Choice(8, 0.9),
        fit if has_fit else None,
        np.inf,
    )


class Asked:
    """A decider with the search before it."""

    def __init__(self, indexes, points=()):
        tasks = {name: entry(name) for name in indexes}
        self.indexes = indexes
        self.decider = ExitDecider(TableMetadata(BACKBONE, ENCODER, tasks), indexes, points)
        self.search = InMemorySearch({name: own.vectors for name, own in indexes.items()})

    def __call__(self, vector, *candidates, **options):
        lookup = Lookup(candidates or ("sst2",), "a text", **options)
        self.decider.check(lookup)
        k = self.decider.most_neighbours(lookup)
        (found,) = self.search.nearest(lookup.candidates, vector[None], k)
        return self.decider.decide(lookup, found, vector)


def asked(evidence, points=(), **parts):
    return Asked({"sst2": index_of(evidence, **parts)}, points)


def alike(*by_layer):
    """Rows that all have the same exit information."""
    return np.tile(np.array(by_layer, np.float32), (N, 1))


@pytest.fixture
def query():
    return unit_vectors(1, DIMENSION, seed=99)[0]


def test_the_exit_is_a_probe_with_its_name(query):
    decision = asked(alike(0.5, 0.88, 0.9, 0.9))(query)
    assert (decision.exit_layer, decision.num_layers) == (2, 4)
    assert (decision.reason, decision.head) == (Reason.RETRIEVED, "probe")
    assert (decision.task, decision.probe) == ("sst2", "sst2/2")
    assert decision.decided_layer is None and decision.explanation is None


def test_full_depth_is_answered_by_the_last_probe(query):
    decision = asked(alike(0.1, 0.2, 0.3, 0.9))(query)
    assert decision.is_full and (decision.head, decision.probe) == ("probe", "sst2/4")
    assert len(decision.label_scores) == 2


def test_what_is_added_to_the_probe_are_the_front_ends_voices(query):
    draw = np.random.default_rng(3)
    voices = {
        "encoder": Probe(
            draw.normal(size=(2, DIMENSION)).astype(np.float32), np.array([0.5, -1], np.float32)
        ),
        "encoder_weights": np.array([1, 2, 3, 4, 5], np.float32),
        "vote_weights": np.array([5, 4, 3, 2, 1], np.float32),
    }
    ask = asked(alike(0.5, 0.88, 0.9, 0.9), **voices)
    own = ask.indexes["sst2"]
    nearest = np.argsort(-(own.vectors @ query))[:VOTERS]
    vote = log_votes((own.vectors @ query)[nearest], own.labels[nearest], own.counts)
    for layer in LAYERS:
        said = own.fit.encoder.scores(query)
        by_hand = (1 + layer) * said + (5 - layer) * vote
        decision = ask(query, exit_layer=layer)
        np.testing.assert_allclose(decision.label_scores, by_hand, rtol=1e-4)
        assert decision.probe == f"sst2/{layer}"
    retrieved = ask(query)
    override = ask(query, exit_layer=retrieved.exit_layer)
    assert retrieved.label_scores == override.label_scores


def test_the_nearest_count_for_most(query):
    evidence = np.tile([0.9, 0.9, 0.9, 0.9], (N, 1))
    ask = asked(evidence)
    nearest = int(np.argmax(ask.indexes["sst2"].vectors @ query))
    evidence[nearest] = [0, 0, 0, 0.9]
    vector = ask.indexes["sst2"].vectors[nearest]
    assert asked(evidence)(vector).exit_layer == 4
    far = ask.indexes["sst2"].vectors[np.argmin(ask.indexes["sst2"].vectors @ vector)]
    assert asked(evidence)(far).exit_layer == 1


def test_rows_of_another_certainty_are_not_asked(query):
    """Half of the rows are sure and leave early; the front end is not sure of the prompt."""
    sure = np.arange(N) % 2 == 0
    evidence = np.where(sure[:, None], [0.95] * 4, [0.2, 0.3, 0.9, 0.9])
    certainties = np.where(sure, 0.95, 0.5).astype(np.float32)
    decision = asked(evidence, certainties=certainties)(query, explain=True, k=N)
    assert decision.exit_layer == 3 and decision.explanation.certainty == pytest.approx(0.5)
    loud = Probe(np.zeros((2, DIMENSION), np.float32), np.array([3, 0], np.float32))
    decision = asked(evidence, certainties=certainties, encoder=loud)(query, explain=True, k=N)
    assert decision.exit_layer == 1 and decision.explanation.certainty == pytest.approx(0.95, 0.01)


def test_the_explanation_is_what_the_rule_read(query):
    draw = np.random.default_rng(1)
    evidence = draw.uniform(size=(N, 4)).astype(np.float32)
    ask = asked(evidence)
    decision = ask(query, explain=True, k=5, budget=0.7, min_layer=2)
    own, told = ask.indexes["sst2"], decision.explanation
    similarities = own.vectors @ query
    near = np.argsort(-similarities, kind="stable")
    weights = evidence_weights(similarities[near[:5]], own.certainties[near[:5]], np.array(0.5))
    by_hand = expected(evidence[near[:5], None], weights)
    np.testing.assert_allclose(told.expected["probe"], by_hand[0, 1:], rtol=1e-5)
    assert list(told.expected) == ["probe"]
    assert (told.choice, told.min_layer, told.max_distance) == (Choice(5, 0.7), 2, 2.0)
    ids = [neighbour.id for neighbour in told.neighbours]
    assert ids == [own.ids[row] for row in near[: len(ids)]] and len(ids) >= 5
    assert [n.label for n in told.neighbours] == [("terrible", "great")[r % 2] for r in near[:12]]
    best = max(told.expected["probe"])
    reaching = [2 + i for i, own in enumerate(told.expected["probe"]) if own >= 0.7 * best]
    assert decision.exit_layer == reaching[0]


@pytest.mark.parametrize(("budget", "layer"), [(0.5, 1), (0.8, 2), (0.95, 3), (1.0, 4)])
def test_the_budget_is_the_tasks_or_the_look_ups(query, budget, layer):
    ask = asked(alike(0.5, 0.75, 0.88, 0.9))
    assert ask(query, budget=budget).exit_layer == layer
    assert ask(query).exit_layer == 3  # 0.9 by the index


def test_k_is_the_tasks_or_the_look_ups(query):
    evidence = np.tile([0.9, 0.9, 0.9, 0.9], (N, 1))
    similarities = unit_vectors(N, DIMENSION) @ query
    order = np.argsort(-similarities)
    evidence[order[1:]] = [0.0, 0.0, 0.9, 0.9]
    assert asked(evidence)(query, k=1).exit_layer == 1
    assert asked(evidence)(query).exit_layer == asked(evidence)(query, k=999).exit_layer == 3


def test_no_layer_before_the_least(query):
    ask = asked(alike(0.9, 0.9, 0.9, 0.9))
    assert [ask(query, min_layer=n).exit_layer for n in (1, 2, 4)] == [1, 2, 4]


@pytest.mark.parametrize(("points", "layer"), [((4,), 4), ((3, 4), 3), ((2, 4), 2), ((1, 3, 4), 3)])
def test_exits_are_at_points_by_what_these_are_expected_to_do(query, points, layer):
    ask = asked(alike(0.5, 0.88, 0.9, 0.9), points=points)
    decision = ask(query)
    assert (decision.exit_layer, decision.probe) == (layer, f"sst2/{layer}")
    assert decision.decided_layer == (None if layer == 2 else 2)
    assert ask(query, min_layer=3).exit_layer == min(p for p in points if p >= 3)


def test_no_evidence_is_full_depth_by_its_probe(query):
    decision = asked(alike(0, 0, 0, 0))(query)
    assert (decision.exit_layer, decision.reason) == (4, Reason.NO_EVIDENCE)
    assert (decision.head, decision.probe) == ("probe", "sst2/4")
    assert len(decision.label_scores) == 2


def test_without_a_probe_full_depth_is_plain(query):
    """Asked for so, not fitted, or of a task that is not certain."""
    silent = index_of(alike(0, 0, 0, 0), plain=alike(0, 0, 0, 0))
    unfitted = index_of(alike(0, 0, 0, 0), plain=alike(0, 0, 0, 0), has_fit=False, seed=1)
    ask = Asked({"sst2": silent, "mr": unfitted})
    for names, head in ((("sst2",), "plain"), (("mr",), None), (("sst2", "mr"), None)):
        decision = ask(query, *names, head=head)
        assert (decision.exit_layer, decision.reason) == (4, Reason.NO_EVIDENCE)
        assert (decision.head, decision.label_scores) == ("plain", ())


def test_far_prompts_run_at_full_depth(query):
    index = index_of(alike(0.9, 0.9, 0.9, 0.9))
    distances = np.sort(1 - index.vectors @ query)
    bound = float(distances[:FAR_NEIGHBOURS].mean())
    for max_distance, reason in ((bound - 1e-3, Reason.FAR), (bound + 1e-3, Reason.RETRIEVED)):
        object.__setattr__(index, "distance_bound", max_distance)
        decision = Asked({"sst2": index})(query)
        assert decision.reason == reason
        assert decision.distance == pytest.approx(distances[0], abs=1e-6)
        assert decision.probe == ("sst2/4" if reason == Reason.FAR else "sst2/1")
    object.__setattr__(index, "distance_bound", 0.0)
    own = Asked({"sst2": index})(index.vectors[3])
    assert own.reason == Reason.RETRIEVED and own.distance < MIN_BOUND  # its own text


def test_an_exit_that_was_asked_for_is_changed_by_nothing(query):
    index = index_of(alike(0.1, 0.1, 0.1, 0.9))
    object.__setattr__(index, "distance_bound", 0.0)
    ask = Asked({"sst2": index}, points=(4,))
    decision = ask(query, exit_layer=2, min_layer=3)
    assert (decision.exit_layer, decision.reason) == (2, Reason.OVERRIDE)
    assert (decision.head, decision.probe) == ("probe", "sst2/2")
    assert len(decision.label_scores) == 2


def test_an_exit_without_a_probe_goes_on_to_the_next_that_has_one(query):
    ask = asked(alike(0.9, 0.9), layers=(2, 4))
    exits = {n: ask(query, exit_layer=n).probe for n in LAYERS}
    assert exits == {1: "sst2/2", 2: "sst2/2", 3: "sst2/4", 4: "sst2/4"}
    assert ask(query).probe == "sst2/2"  # nothing is known of layer 1
    assert ask(query, min_layer=3).probe == "sst2/4"


def test_asked_for_the_plain_head_the_papers_rule_decides(query):
    draw = np.random.default_rng(4)
    plain = np.where(draw.random((N, 4)) > 0.4, draw.uniform(0.5, 1, (N, 4)), 0)
    ask = asked(alike(0.9, 0.9, 0.9, 0.9), plain=plain.astype(np.float32))
    own = ask.indexes["sst2"]
    for vector in unit_vectors(20, DIMENSION, seed=5):
        near = np.argsort(-(own.vectors @ vector))
        for k in (12, 3):
            by_hand = published(plain[near[:k]], 1 - (own.vectors @ vector)[near[:k]])
            decision = ask(vector, head="plain", k=None if k == 12 else k)
            assert decision.exit_layer == by_hand and decision.reason == Reason.RETRIEVED
            assert (decision.head, decision.probe) == ("plain", None)
            assert decision.label_scores == ()
    assert ask(query).probe == "sst2/1"


def test_the_papers_rule_at_points_and_after_the_least_layer(query):
    ask = asked(alike(0.9, 0.9, 0.9, 0.9), plain=alike(0, 0.9, 0, 0))
    assert ask(query, head="plain").exit_layer == 2
    assert ask(query, head="plain", min_layer=3).exit_layer == 3
    ask = asked(alike(0.9, 0.9, 0.9, 0.9), plain=alike(0, 0.9, 0, 0), points=(1, 3, 4))
    decision = ask(query, head="plain")
    assert (decision.exit_layer, decision.decided_layer) == (3, 2)


def test_without_a_fit_the_papers_rule_decides(query):
    ask = asked(alike(0, 0, 0, 0), has_fit=False)
    decision = ask(query, explain=True)
    assert (decision.exit_layer, decision.head) == (3, "plain")
    assert decision.explanation.certainty is None
    override = ask(query, exit_layer=2)
    assert (override.exit_layer, override.reason) == (2, Reason.OVERRIDE)
    assert (override.head, override.probe, override.label_scores) == ("plain", None, ())


def test_labels_that_the_plain_head_cannot_tell_apart_give_it_no_evidence(query):
    index = index_of(alike(0.9, 0.9, 0.9, 0.9))
    object.__setattr__(index, "plain_probs", None)
    ask = Asked({"sst2": index})
    assert ask(query).probe == "sst2/1"
    decision = ask(query, head="plain")
    assert (decision.exit_layer, decision.reason) == (4, Reason.NO_EVIDENCE)


def test_the_nearest_row_says_whose_prompt_it_is():
    """Two tasks share a template; rows of the other do not count."""
    indexes = {
        "mr": index_of(alike(0.9, 0.9, 0.9, 0.9), seed=1),
        "sst2": index_of(alike(0, 0, 0.9, 0.9), seed=2),
        "cr": index_of(alike(0, 0, 0, 0), has_fit=False, seed=3),
    }
    ask = Asked(indexes)
    for name, probe in (("mr", "mr/1"), ("sst2", "sst2/3"), ("cr", None)):
        for vector in indexes[name].vectors[:5]:
            decision = ask(vector, "cr", "mr", "sst2", explain=True)
            assert (decision.task, decision.probe) == (name, probe)
            told = {neighbour.id for neighbour in decision.explanation.neighbours}
            assert told <= set(indexes[name].ids)
        override = ask(vector, "cr", "mr", "sst2", exit_layer=2)
        assert override.probe == (None if name == "cr" else f"{name}/2")
    alone = ask(indexes["mr"].vectors[0], "sst2")
    assert alone.task == "sst2"


def test_far_is_judged_by_all_rows_that_were_searched():
    indexes = {"mr": index_of(alike(0.9, 0.9, 0.9, 0.9)[:1]), "sst2": index_of(alike(0, 0, 0, 1))}
    for index in indexes.values():
        object.__setattr__(index, "distance_bound", 0.1)
    ask, (row,) = Asked(indexes), indexes["mr"].vectors
    aside = unit_vectors(1, DIMENSION, seed=7)[0]
    aside -= (aside @ row) * row
    vector = (0.95 * row + np.sqrt(1 - 0.95**2) * aside / np.linalg.norm(aside)).astype(np.float32)
    assert ask(vector, "mr").reason == Reason.RETRIEVED  # at .05 of the only row
    assert ask(vector, "mr", "sst2").reason == Reason.FAR  # its other neighbours are far


def test_as_many_rows_are_searched_as_anything_reads():
    ask = Asked({"mr": index_of(alike(0.9, 0.9, 0.9, 0.9)), "sst2": index_of(alike(0, 0, 0, 1))})
    assert ask.decider.most_neighbours(Lookup(("mr",), "")) == VOTERS
    assert ask.decider.most_neighbours(Lookup(("mr", "sst2"), "", k=999)) == 999
    assert VOTERS > FAR_NEIGHBOURS


def test_free_text_may_leave_by_shortcut_and_never_looks_up_what_none_keeps(query):
    quality = np.zeros((N, 2, 4), np.float32)
    quality[:, 1, 1], quality[:, 0, 2], quality[:, 0, 3] = 0.4, 0.45, 0.5
    index = index_of(alike(0, 0, 0, 0), has_fit=False)
    own = {
        "heads": ("plain", "shortcut"),
        "evidence": quality,
        "plain_probs": None,
        "counts": np.zeros(0, int),
        "most_kept": 0.9,
    }
    for name, value in own.items():
        object.__setattr__(index, name, value)
    tasks = {"xsum": TaskEntry.of(get_task("xsum"), (), (2, 3, 4))}
    ask = Asked({"sst2": index_of(alike(0, 0, 0, 1))})
    ask.decider = ExitDecider(TableMetadata(BACKBONE, ENCODER, tasks), {"xsum": index})
    ask.search = InMemorySearch({"xsum": index.vectors})
    exits = [ask(query, "xsum", budget=b) for b in (0.75, 0.85)]
    assert [(d.exit_layer, d.head) for d in exits] == [(2, "shortcut"), (3, "plain")]
    assert all(d.probe is None for d in exits)
    never = [ask.decider.never_exits(Lookup(("xsum",), "", budget=b)) for b in (0.85, 0.9, 0.95)]
    assert never == [False, False, True]
    kept = ask(query, "xsum", budget=0.95, explain=True)
    assert kept.reason == Reason.NO_EXIT and set(kept.explanation.expected) == {"plain", "shortcut"}
    assert kept.explanation.neighbours[0].label is None


def test_label_tasks_are_always_looked_up(query):
    decider = asked(alike(0, 0, 0, 1)).decider
    assert not decider.never_exits(Lookup(("sst2",), "", budget=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k = 0 is not allowed"),
        ({"budget": 0}, r"budget 0 is not within \(0, 1\]"),
        ({"budget": 1.5}, "budget 1.5"),
    ],
)
def test_bad_look_ups_are_named(query, options, message):
    with pytest.raises(RaeeError, match=message):
        asked(alike(0, 0, 0, 1))(query, **options)
    with pytest.raises(RaeeError, match=r"\('trec',\) must be one or more of this table's: sst2"):
        asked(alike(0, 0, 0, 1))(query, "trec")
