"""Decisions from a real table and the real encoder."""

import dataclasses
import re
import shutil

import numpy as np
import pytest

from raee_serve.checkpoints import resolve_encoder
from raee_serve.errors import BindingError, CheckpointError, RaeeError, TableError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.records import Reason
from raee_serve.retrieval import retriever as retriever_module
from raee_serve.retrieval.decider import ExitDecider
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.retrieval.task_index import MIN_BOUND
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.schema import RuleChoice
from raee_serve.table.store import ExitTable
from raee_serve.table.tasks import get_task
from tests.unit.table_rows import BACKBONE, entry, label_rows, metadata

pytestmark = pytest.mark.unit

PRAISE = ["a wonderful film", "a great and moving film", "a delightful film", "a superb film"]
SPITE = ["a dull film", "a boring and stupid film", "an awful film", "a terrible film"]
HOTELS = ["the hotel room was filthy", "the hotel was clean and quiet"]
PRAISE_LAYER, SPITE_LAYER, HOTEL_LAYER = 2, 3, 1


def right_at(layer):
    """Probability of gold by layer: right at one layer only."""
    return [0.9 if layer == own else 0.1 for own in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def uri(encoder, tmp_path_factory):
    """sst2: praise exits at 2, spite at 3; cr: hotels exit at 1; mpqa: nothing is ever right."""
    uri = str(tmp_path_factory.mktemp("tables") / "films")
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    contents = {
        "sst2": [(t, PRAISE_LAYER) for t in PRAISE] + [(t, SPITE_LAYER) for t in SPITE],
        "cr": [(t, HOTEL_LAYER) for t in HOTELS],
        "mpqa": [("a poor choice", 0), ("a poor decision", 0)],
    }
    for name, rows in contents.items():
        texts = [text for text, _ in rows]
        right = [right_at(layer) for _, layer in rows]
        table.put_task(entry(name))
        table.add(name, label_rows([f"{name}:{t}" for t in texts], encoder.encode(texts), right))
    table.put_task(entry("subj"))  # registered, but without rows
    return uri


@pytest.fixture(scope="module")
def retriever(uri):
    return ExitRetriever.open(uri, backbone=BACKBONE)


def sst2(text, **options):
    return Lookup(("sst2",), text, **options)


def test_encoder_gives_unit_vectors_by_meaning(encoder):
    vectors = encoder.encode([PRAISE[0], PRAISE[2], SPITE[0]])
    assert vectors.shape == (3, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert encoder.encode([]).shape == (0, 384)


def test_encoder_identity_is_its_weights(encoder):
    moved = Encoder(resolve_encoder("minilm"))
    assert moved.identity().same_as(encoder.identity())
    assert moved.identity().name != encoder.identity().name
    broken = Encoder("minilm")
    next(iter(broken._model.parameters())).data[0, 0] += 1
    assert not broken.identity().same_as(encoder.identity())


def test_encoder_refuses_vectors_that_are_not_finite():
    broken = Encoder("minilm")
    next(iter(broken._model.parameters())).data[:] = float("nan")
    with pytest.raises(RaeeError, match="not finite"):
        broken.encode(["a film"])


def test_missing_encoder(tmp_path):
    with pytest.raises(CheckpointError, match="cannot load encoder"):
        Encoder(str(tmp_path))


def test_attributes(retriever):
    assert retriever.num_layers == 4 and retriever.num_rows == 12
    assert set(retriever.tasks) == {"sst2", "cr", "mpqa"}
    assert retriever.tasks["sst2"] is get_task("sst2")
    assert retriever.label_token_ids["sst2"] == (10, 11)


def test_neighbours_decide_the_layer(retriever):
    praise, spite = retriever.decide([sst2(PRAISE[0]), sst2(SPITE[3])])
    assert (praise.exit_layer, spite.exit_layer) == (PRAISE_LAYER, SPITE_LAYER)
    for decision in (praise, spite):
        assert decision.reason == Reason.RETRIEVED and decision.task == "sst2"
        assert decision.num_layers == 4 and decision.lookup_ms > 0
        assert decision.distance < MIN_BOUND


def test_k_and_rule_come_with_each_lookup(retriever):
    lookups = [sst2("a lovely film", k=k, rule=r) for k in (1, 4, 999) for r in (None, "published")]
    assert [d.exit_layer for d in retriever.decide(lookups)][:4] == [PRAISE_LAYER] * 4
    assert all(d.reason == Reason.RETRIEVED for d in retriever.decide(lookups))


def test_plain_rules_bias_no_label(retriever):
    for rule in ("earliest", "published"):
        (decision,) = retriever.decide([sst2(PRAISE[0], rule=rule)])
        assert decision.label_bias == ()


def test_fused_exits_favour_the_label_of_the_nearest(uri):
    """Labels alternate among the rows; every label is as frequent as the other."""
    retriever = ExitRetriever.open(uri, backbone=BACKBONE, vote_weight=50.0)
    for row, text in enumerate(PRAISE):
        (decision,) = retriever.decide([sst2(text, rule="fused")])
        assert decision.reason == Reason.RETRIEVED
        assert np.argmax(decision.label_bias) == row % 2


def test_label_rules_are_the_default_for_label_words(retriever):
    stacked, default = (
        retriever.decide([sst2(PRAISE[0], **options)])[0] for options in ({"rule": "stacked"}, {})
    )
    assert dataclasses.replace(default, lookup_ms=0) == dataclasses.replace(stacked, lookup_ms=0)
    assert default.label_bias


def test_a_stored_choice_holds_unless_told_otherwise(uri, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(uri, copy)
    ExitTable.open(str(copy)).put_choices({"sst2": RuleChoice("earliest", 3, 0.8, 1.0)})
    stored = ExitRetriever.open(str(copy), backbone=BACKBONE)
    assert stored.choices["sst2"] == RuleChoice("earliest", 3, 0.8, 1.0)
    assert stored.choices["cr"].rule == "stacked"
    assert stored.decide([sst2(PRAISE[0])])[0].label_bias == ()
    assert stored.decide([sst2(PRAISE[0], rule="fused")])[0].label_bias
    told = ExitRetriever.open(str(copy), backbone=BACKBONE, fraction=0.5)
    assert told.choices["sst2"] == RuleChoice("earliest", 3, 0.5, 1.0)


def test_far_prompts_run_at_full_depth(retriever):
    (decision,) = retriever.decide([sst2("quantum chromodynamics on a lattice of spins")])
    assert (decision.exit_layer, decision.reason) == (4, Reason.FAR)
    assert decision.task == "sst2" and decision.distance > 0.5


def test_one_stray_row_brings_no_foreign_prompt_near(encoder, tmp_path):
    stray = "quantum chromodynamics on a lattice"
    kinds = ("fine", "dull", "slow", "loud", "sweet", "sad", "odd", "grim")
    texts = [f"a {kind} {what}" for kind in kinds for what in ("film", "movie", "plot", "scene")]
    table = ExitTable.open_or_create(str(tmp_path / "strays"), metadata(encoder.identity()))
    table.put_task(entry("sst2"))
    rows = [*texts, "a wild film", "a wild plot", "a wild scene", stray]
    table.add("sst2", label_rows(rows, encoder.encode(rows)))
    retriever = ExitRetriever.open(table.uri, backbone=BACKBONE)
    foreign, own, in_task = retriever.decide(
        [sst2(f"{stray} of spins"), sst2(stray), sst2("a fine and wild film")]
    )
    assert foreign.reason == Reason.FAR and foreign.distance < 0.3  # near to one row only
    assert (own.reason, in_task.reason) == (Reason.RETRIEVED, Reason.RETRIEVED)


def test_distance_bound_may_be_set(uri):
    near, wide = (
        ExitRetriever.open(uri, backbone=BACKBONE, max_distance=bound) for bound in (0.01, 2.0)
    )
    assert near.decide([sst2("a lovely film")])[0].reason == Reason.FAR
    assert near.decide([sst2(PRAISE[0])])[0].reason == Reason.RETRIEVED
    assert wide.decide([sst2("quantum chromodynamics")])[0].reason == Reason.RETRIEVED


def test_no_evidence_runs_at_full_depth(retriever):
    (decision,) = retriever.decide([Lookup(("mpqa",), "a poor choice")])
    assert (decision.exit_layer, decision.reason) == (4, Reason.NO_EVIDENCE)


def test_several_candidates_are_searched_together(retriever):
    both = ("sst2", "cr")
    options = {"k": 1, "rule": "earliest"}
    hotel, film = retriever.decide(
        [Lookup(both, HOTELS[1], **options), Lookup(both, PRAISE[1], **options)]
    )
    assert (hotel.task, hotel.exit_layer) == ("cr", HOTEL_LAYER)
    assert (film.task, film.exit_layer) == ("sst2", PRAISE_LAYER)
    wide = Lookup(both, PRAISE[1])
    assert retriever.decide([wide])[0].reason == Reason.RETRIEVED


def test_a_batch_decides_in_order_as_its_prompts_alone(retriever):
    lookups = [
        sst2(SPITE[0]),
        Lookup(("sst2", "cr"), HOTELS[0], k=1),
        Lookup(("mpqa",), "a poor choice"),
        sst2(PRAISE[3], k=3),
        sst2("an engine repair manual"),
    ]
    together = retriever.decide(lookups)
    for lookup, decision in zip(lookups, together, strict=True):
        (alone,) = retriever.decide([lookup])
        assert (alone.exit_layer, alone.reason, alone.task) == (
            decision.exit_layer,
            decision.reason,
            decision.task,
        )
    assert retriever.decide([]) == []


def test_a_decision_is_explained_only_if_asked(retriever):
    plain, asked = retriever.decide(
        [sst2(PRAISE[0]), sst2(PRAISE[0], rule="fused", explain=True, k=3)]
    )
    assert plain.explanation is None
    told = asked.explanation
    ids, distances = zip(*((row.id, row.distance) for row in told.neighbours), strict=True)
    golds = {f"sst2:{text}": ("terrible", "great")[row % 2] for row, text in enumerate(PRAISE)}
    assert {row.id: row.label for row in told.neighbours}.items() <= golds.items()
    assert ids[0] == f"sst2:{PRAISE[0]}"
    assert len(set(ids)) == 3 and list(distances) == sorted(distances)
    assert distances[0] == asked.distance
    assert (told.choice.rule, told.choice.k, told.min_layer) == ("fused", 3, 1)
    assert set(told.scores) == {asked.head} == {"fused"}
    assert len(told.scores["fused"]) == retriever.num_layers
    assert asked.exit_layer == 1 + int(
        np.argmax(np.array(told.scores["fused"]) >= 0.95 * max(told.scores["fused"]))
    )


def test_the_explanation_has_every_head_of_the_rule_and_of_full_depth(retriever):
    (decision,) = retriever.decide([sst2(PRAISE[0], rule="calibrated", explain=True)])
    assert set(decision.explanation.scores) == {"plain", "calibrated"}
    far, none = retriever.decide(
        [
            sst2("quantum chromodynamics on a lattice of spins", explain=True),
            Lookup(("mpqa",), "a poor choice", rule="earliest", explain=True),
        ]
    )
    assert far.reason == Reason.FAR and far.distance > far.explanation.max_distance
    assert none.reason == Reason.NO_EVIDENCE and set(none.explanation.scores["plain"]) == {0}


def test_the_rule_reads_no_layer_before_the_least(retriever):
    lookups = [sst2(PRAISE[0], rule="earliest", k=4, min_layer=n, explain=True) for n in (1, 2, 3)]
    free, same, barred = retriever.decide(lookups)
    assert (free.exit_layer, same.exit_layer) == (PRAISE_LAYER, PRAISE_LAYER)
    assert barred.reason == Reason.NO_EVIDENCE and barred.exit_layer == 4
    assert len(same.explanation.scores["plain"]) == 3
    both = sst2("a film", rule="earliest", k=8, min_layer=3)
    assert retriever.decide([both])[0].exit_layer == SPITE_LAYER


@pytest.mark.parametrize(("points", "expected"), [((3,), (4, 3)), ((2, 3), (2, 3)), ((1,), (4, 4))])
def test_exits_are_decided_at_exit_points(uri, points, expected):
    """Nothing speaks for praise after its own layer, so it goes on to full depth."""
    retriever = ExitRetriever.open(uri, backbone=BACKBONE, exit_points=points)
    praise, spite = retriever.decide([sst2(t[0], rule="earliest", k=4) for t in (PRAISE, SPITE)])
    assert (praise.exit_layer, spite.exit_layer) == expected
    wanted = {PRAISE_LAYER: praise, SPITE_LAYER: spite}
    for layer, decision in wanted.items():
        assert decision.reason == Reason.RETRIEVED
        assert decision.decided_layer == (None if decision.exit_layer == layer else layer)


def test_exit_points_bring_the_bias_of_the_layer_that_runs(uri, monkeypatch):
    monkeypatch.setattr(ExitDecider, "_label_bias", lambda _, head, layer, *rest: (layer,))
    retriever = ExitRetriever.open(uri, backbone=BACKBONE, exit_points=[4])
    (decision,) = retriever.decide([sst2(PRAISE[0], rule="fused")])
    assert (decision.exit_layer, decision.label_bias) == (4, (4,))


def test_exit_points_outside_the_backbone_are_named(uri):
    with pytest.raises(RaeeError, match=r"exit points are \[5\]; allowed: layers 1\.\.4"):
        ExitRetriever.open(uri, backbone=BACKBONE, exit_points=[5])


def test_a_least_layer_brings_the_bias_of_the_layer_that_runs(retriever, monkeypatch):
    monkeypatch.setattr(ExitDecider, "_label_bias", lambda _, head, layer, *rest: (layer,))
    lookups = [sst2("a film", rule="fused", k=8, min_layer=n) for n in (1, 3)]
    free, deep = retriever.decide(lookups)
    assert free.exit_layer < 3 <= deep.exit_layer
    assert (free.label_bias, deep.label_bias) == ((free.exit_layer,), (deep.exit_layer,))


def test_the_cost_of_each_batch_is_told(uri):
    retriever, costs = ExitRetriever.open(uri, backbone=BACKBONE), []
    retriever.observe = costs.append
    retriever.decide([sst2(PRAISE[0]), sst2(SPITE[0]), sst2(PRAISE[0])])
    retriever.decide([sst2(PRAISE[0])])
    assert [(cost.cache_hits, cost.cache_misses) for cost in costs] == [(1, 2), (1, 0)]
    assert set(costs[0].seconds) == {"encode", "search", "aggregate"}
    assert all(seconds > 0 for seconds in costs[0].seconds.values())


def test_the_table_has_a_version_and_rows_by_task(retriever, uri):
    assert retriever.table_version == ExitTable.open(uri).version >= 1
    assert retriever.rows_by_task == {"sst2": 8, "cr": 2, "mpqa": 2}


@pytest.mark.parametrize(
    ("lookup", "message"),
    [
        (sst2("x", k=0), "k = 0 is not allowed, it must be at least 1"),
        (sst2("x", k=-3), "k = -3"),
        (sst2("x", rule="median"), "'median'; known rules: published, earliest, calibrated, fused"),
        (Lookup(("trec",), "x"), r"'trec'.*cr, mpqa, sst2"),
        (Lookup((), "x"), "one or more"),
    ],
)
def test_bad_lookups_are_named(retriever, lookup, message):
    with pytest.raises(RaeeError, match=message):
        retriever.decide([lookup])


def test_table_may_vanish_under_an_open_retriever(uri, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(uri, copy)
    retriever = ExitRetriever.open(str(copy), backbone=BACKBONE)
    shutil.rmtree(copy)
    assert retriever.decide([sst2(PRAISE[0])])[0].exit_layer == PRAISE_LAYER
    with pytest.raises(TableError, match="no such directory"):
        ExitRetriever.open(str(copy), backbone=BACKBONE)


def test_other_backbone_is_refused(uri):
    other = BackboneIdentity("Gemma3ForCausalLM", 18, "ef" * 32)
    with pytest.raises(BindingError, match=r"LlamaForCausalLM.*Gemma3ForCausalLM"):
        ExitRetriever.open(uri, backbone=other)
    retrained = dataclasses.replace(BACKBONE, weights="ef" * 32)
    with pytest.raises(BindingError, match=r"abab.*efef"):
        ExitRetriever.open(uri, backbone=retrained)


def test_other_encoder_is_refused(uri, encoder, tmp_path):
    other = Encoder("minilm")
    next(iter(other._model.parameters())).data[0, 0] += 1
    other._model.save(str(tmp_path / "retrained"))
    with pytest.raises(BindingError, match=r"minilm \(384 .*retrained \(384 "):
        ExitRetriever.open(uri, backbone=BACKBONE, encoder=str(tmp_path / "retrained"))


def test_other_template_is_refused(uri, monkeypatch):
    built = get_task("cr")
    changed = dataclasses.replace(built, prompt=CompletionPrompt("{text} I felt"))
    monkeypatch.setitem(retriever_module.TASKS, "cr", changed)
    message = rf"task cr .*{built.version}.*{changed.version}"
    with pytest.raises(BindingError, match=message):
        ExitRetriever.open(uri, backbone=BACKBONE)


def test_unknown_task_in_the_table_is_refused(uri, monkeypatch):
    monkeypatch.delitem(retriever_module.TASKS, "cr")
    with pytest.raises(TableError, match=f"{re.escape(uri)} holds an unknown task 'cr'"):
        ExitRetriever.open(uri, backbone=BACKBONE)


def test_empty_table_is_refused(encoder, tmp_path):
    uri = str(tmp_path / "empty")
    ExitTable.open_or_create(uri, metadata(encoder.identity())).put_task(entry("sst2"))
    with pytest.raises(TableError, match="holds no rows"):
        ExitRetriever.open(uri, backbone=BACKBONE)


def test_a_single_row_knows_its_own_text_only(encoder, tmp_path):
    uri = str(tmp_path / "one")
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    table.put_task(entry("sst2"))
    table.add("sst2", label_rows(["a"], encoder.encode(["a wonderful film"])))
    retriever = ExitRetriever.open(uri, backbone=BACKBONE)
    own, other = retriever.decide([sst2("a wonderful film"), sst2("a dull film")])
    assert (own.reason, other.reason) == (Reason.RETRIEVED, Reason.FAR)
