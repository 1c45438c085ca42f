"""Decisions from a real table and the real encoder."""

import dataclasses
import re
import shutil

import numpy as np
import pytest

from raee_serve.checkpoints import resolve_encoder
from raee_serve.errors import BindingError, CheckpointError, RaeeError, TableError
from raee_serve.exits.choice import Choice
from raee_serve.exits.neighbours import log_votes
from raee_serve.exits.probes import unpacked
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.records import Reason
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.retrieval.task_index import MIN_BOUND
from raee_serve.table.schema import Built, TaskEntry
from raee_serve.table.store import ExitTable
from raee_serve.tasks.prompts import CompletionPrompt
from raee_serve.tasks.task import Task
from tests.unit.label_tables import MANY, id_of, new_table, put_labels
from tests.unit.table_rows import (
    BACKBONE,
    LAYERS,
    entry,
    label_rows,
    made_fit,
    metadata,
    put_fit,
)

pytestmark = pytest.mark.unit

PRAISE = ["a wonderful film", "a great and moving film", "a delightful film", "a superb film"]
SPITE = ["a dull film", "a boring and stupid film", "an awful film", "a terrible film"]
HOTELS = ["the hotel room was filthy", "the hotel was clean and quiet"]
PRAISE_LAYER, SPITE_LAYER, HOTEL_LAYER = 2, 3, 1


def right_at(layer):
    """Probability of gold by layer: right at one layer only."""
    return [0.9 if layer == own else 0.1 for own in LAYERS]


def put(table, encoder, name, texts, layers, *, has_fit=True, **parts):
    """A finished task whose probes are right at the layer of each text alone, as the plain head
    is; layer 0 for none. parts: of the fit."""
    right = [right_at(layer) if layer else [0.0] * 4 for layer in layers]
    rows = label_rows(list(map(id_of, texts)), encoder.encode(texts), right)
    put_fit(table, name, rows, made_fit(rows.ids, right, **parts) if has_fit else None)


@pytest.fixture(scope="module")
def uri(encoder, tmp_path_factory):
    """sst2: praise exits at 2, spite at 3; cr: hotels exit at 1; mpqa: nothing is ever right; mr:
    without probes."""
    uri = str(tmp_path_factory.mktemp("tables") / "films")
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    films = [PRAISE_LAYER] * len(PRAISE) + [SPITE_LAYER] * len(SPITE)
    put(table, encoder, "sst2", PRAISE + SPITE, films)
    put(table, encoder, "cr", HOTELS, [HOTEL_LAYER] * 2)
    put(table, encoder, "mpqa", ["a poor choice", "a poor decision"], [0, 0])
    put(table, encoder, "mr", PRAISE, [PRAISE_LAYER] * 4, has_fit=False)
    table.put_task(entry("subj"))  # recorded, but without rows
    table.finish("subj", Built(0, "it has no rows"), None)
    table.put_task(entry("trec"))  # with rows, but not finished
    table.add("trec", label_rows(["ab"], encoder.encode(["who?"])))
    return uri


@pytest.fixture(scope="module")
def retriever(uri, encoder):
    return opened(uri, encoder)


def opened(uri, encoder, **options):
    return ExitRetriever.open(uri, backbone=BACKBONE, encoder=encoder, **options)


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
    assert retriever.num_layers == 4 and retriever.num_rows == 16
    assert set(retriever.tasks) == {"sst2", "cr", "mpqa", "mr"}
    assert retriever.tasks["sst2"] == entry("sst2").task and retriever.tasks["sst2"].data is None
    assert retriever.heads == {"sst2": "probe", "cr": "probe", "mpqa": "probe", "mr": "plain"}
    assert retriever.plain_token_ids["sst2"] == (10, 11)
    assert retriever.choices["sst2"] == Choice.default("labels")


def test_the_probe_set_is_that_of_all_fits(retriever, uri):
    found = unpacked(retriever.probe_set.packed)
    names = {f"{task}/{at}" for task in ("sst2", "cr", "mpqa") for at in (*LAYERS, "alone")}
    assert set(found) == names and re.fullmatch("[0-9a-f]{16}", retriever.probe_set.id)
    assert opened(uri, retriever._encoder._encoder).probe_set == retriever.probe_set


def test_tasks_come_from_the_table_alone(uri, encoder, monkeypatch):
    monkeypatch.setattr("raee_serve.tasks.registry.TASKS", {})
    own = opened(uri, encoder).tasks["sst2"]
    assert own.match("a film It was") == "a film" and own.labels == ("terrible", "great")


def test_neighbours_decide_the_layer(retriever):
    praise, spite = retriever.decide([sst2(PRAISE[0]), sst2(SPITE[3])])
    assert (praise.exit_layer, spite.exit_layer) == (PRAISE_LAYER, SPITE_LAYER)
    for decision in (praise, spite):
        assert decision.reason == Reason.RETRIEVED and decision.task == "sst2"
        assert decision.num_layers == 4 and decision.lookup_ms > 0
        assert decision.distance < MIN_BOUND
        assert decision.probe == f"sst2/{decision.exit_layer}" and len(decision.label_scores) == 2


def test_k_and_head_come_with_each_lookup(retriever):
    for head in (None, "plain"):
        lookups = [sst2("a lovely film", k=k, head=head) for k in (1, 4, 999)]
        found = retriever.decide(lookups)
        assert [d.exit_layer for d in found[:2]] == [PRAISE_LAYER] * 2
        assert {d.head for d in found} == {head or "probe"}
        assert {d.reason for d in found} == {Reason.RETRIEVED}


def test_a_task_without_probes_is_decided_by_the_papers_rule(retriever):
    (decision,) = retriever.decide([Lookup(("mr",), PRAISE[0])])
    assert (decision.exit_layer, decision.head, decision.probe) == (PRAISE_LAYER, "plain", None)


def test_the_budget_is_the_servers_the_tables_or_the_look_ups(uri, encoder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(uri, copy)
    ExitTable.open(str(copy)).put_choices({"sst2": Choice(3, 0.8)})
    stored = opened(str(copy), encoder)
    assert stored.choices["sst2"] == Choice(3, 0.8)
    assert stored.choices["cr"] == Choice.default("labels")
    told = opened(str(copy), encoder, budget=0.5)
    assert told.choices["sst2"] == Choice(3, 0.5) and told.choices["cr"].budget == 0.5
    (kept, asked) = told.decide([sst2(PRAISE[0], explain=True), sst2(PRAISE[0], budget=0.1)])
    assert kept.explanation.choice == Choice(3, 0.5)
    assert (kept.exit_layer, asked.exit_layer) == (PRAISE_LAYER, 1)


def test_an_exit_that_was_asked_for_is_told_what_the_front_end_says(encoder, tokenizer, tmp_path):
    """Probes that were fitted: the text is embedded whatever the exit is."""
    table = new_table(str(tmp_path / "t"), BACKBONE, encoder)
    put_labels(table, "sst2", MANY, encoder, tokenizer, layer=2)
    retriever, fit = opened(table.uri, encoder, max_distance=0.0), table.fit("sst2")
    decisions = retriever.decide([sst2("something else", exit_layer=n) for n in LAYERS])
    assert [d.exit_layer for d in decisions] == list(LAYERS)
    assert {d.reason for d in decisions} == {Reason.OVERRIDE}
    rows, vector = table.rows("sst2"), encoder.encode(["something else"])[0]
    vote = log_votes(
        np.sort(rows.vectors @ vector)[::-1],
        rows.golds[np.argsort(-(rows.vectors @ vector))],
        np.bincount(rows.golds),
    )
    for layer, decision in zip(LAYERS, decisions, strict=True):
        expected = fit.front_scores(layer, vector, vote)
        np.testing.assert_allclose(decision.label_scores, expected, atol=1e-4)
    assert retriever.decide([sst2("something else")])[0].reason == Reason.FAR


def test_far_prompts_run_at_full_depth(retriever):
    (decision,) = retriever.decide([sst2("quantum chromodynamics on a lattice of spins")])
    assert (decision.exit_layer, decision.reason) == (4, Reason.FAR)
    assert decision.task == "sst2" and decision.distance > 0.5


def test_one_stray_row_brings_no_foreign_prompt_near(encoder, tmp_path):
    stray = "quantum chromodynamics on a lattice"
    kinds = ("fine", "dull", "slow", "loud", "sweet", "sad", "odd", "grim")
    texts = [f"a {kind} {what}" for kind in kinds for what in ("film", "movie", "plot", "scene")]
    table = ExitTable.open_or_create(str(tmp_path / "strays"), metadata(encoder.identity()))
    rows = [*texts, "a wild film", "a wild plot", "a wild scene", stray]
    put(table, encoder, "sst2", rows, [2] * len(rows))
    retriever = opened(table.uri, encoder)
    foreign, own, in_task = retriever.decide(
        [sst2(f"{stray} of spins"), sst2(stray), sst2("a fine and wild film")]
    )
    assert foreign.reason == Reason.FAR and foreign.distance < 0.3  # near to one row only
    assert (own.reason, in_task.reason) == (Reason.RETRIEVED, Reason.RETRIEVED)


def test_distance_bound_may_be_set(uri, encoder):
    near, wide = (opened(uri, encoder, max_distance=bound) for bound in (0.01, 2.0))
    assert near.decide([sst2("a lovely film")])[0].reason == Reason.FAR
    assert near.decide([sst2(PRAISE[0])])[0].reason == Reason.RETRIEVED
    assert wide.decide([sst2("quantum chromodynamics")])[0].reason == Reason.RETRIEVED


def test_no_evidence_runs_at_full_depth(retriever):
    (decision,) = retriever.decide([Lookup(("mpqa",), "a poor choice")])
    assert (decision.exit_layer, decision.reason) == (4, Reason.NO_EVIDENCE)


def test_several_candidates_are_searched_together(retriever):
    both = ("sst2", "cr")
    options = {"k": 1}
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
    plain, asked = retriever.decide([sst2(PRAISE[0]), sst2(PRAISE[0], explain=True, k=3)])
    assert plain.explanation is None
    told = asked.explanation
    ids, distances = zip(*((row.id, row.distance) for row in told.neighbours), strict=True)
    golds = {id_of(text): ("terrible", "great")[row % 2] for row, text in enumerate(PRAISE)}
    assert golds.items() <= {row.id: row.label for row in told.neighbours}.items()
    assert ids[0] == id_of(PRAISE[0])
    assert len(set(ids)) == len(ids) and list(distances) == sorted(distances)
    assert distances[0] == asked.distance
    assert (told.choice, told.min_layer) == (Choice(3, 0.98), 1)
    assert set(told.expected) == {asked.head} == {"probe"}
    promised = np.array(told.expected["probe"])
    assert len(promised) == retriever.num_layers and told.certainty == pytest.approx(0.5)
    assert asked.exit_layer == 1 + int(np.argmax(promised >= 0.98 * promised.max()))


def test_full_depth_is_explained_too(retriever):
    far, none = retriever.decide(
        [
            sst2("quantum chromodynamics on a lattice of spins", explain=True),
            Lookup(("mpqa",), "a poor choice", explain=True),
        ]
    )
    assert far.reason == Reason.FAR and far.distance > far.explanation.max_distance
    assert none.reason == Reason.NO_EVIDENCE and set(none.explanation.expected["probe"]) == {0}


def test_the_rule_reads_no_layer_before_the_least(retriever):
    lookups = [sst2(PRAISE[0], k=4, min_layer=n, explain=True) for n in (1, 2, 3)]
    free, same, barred = retriever.decide(lookups)
    assert (free.exit_layer, same.exit_layer) == (PRAISE_LAYER, PRAISE_LAYER)
    assert barred.exit_layer >= 3 and barred.probe == f"sst2/{barred.exit_layer}"
    assert len(same.explanation.expected["probe"]) == 3


@pytest.mark.parametrize(
    ("points", "praise"), [((3,), (4, 2)), ((2, 3), (2, None)), ((4,), (4, 2))]
)
def test_exits_are_decided_at_exit_points(uri, encoder, points, praise):
    """Nothing speaks for praise after its own layer, so it goes on to full depth."""
    retriever = opened(uri, encoder, exit_points=points)
    (decision,) = retriever.decide([sst2(PRAISE[0], k=4)])
    assert (decision.exit_layer, decision.decided_layer) == praise
    assert decision.reason == Reason.RETRIEVED
    assert decision.probe == f"sst2/{decision.exit_layer}"


def test_exit_points_outside_the_backbone_are_named(uri, encoder):
    with pytest.raises(RaeeError, match=r"exit points are \[5\]; allowed: layers 1\.\.4"):
        opened(uri, encoder, exit_points=[5])


def test_the_cost_of_each_batch_is_told(uri, encoder):
    retriever, costs = opened(uri, encoder), []
    retriever.observe = costs.append
    retriever.decide([sst2(PRAISE[0]), sst2(SPITE[0]), sst2(PRAISE[0])])
    retriever.decide([sst2(PRAISE[0])])
    assert [(cost.cache_hits, cost.cache_misses) for cost in costs] == [(1, 2), (1, 0)]
    assert set(costs[0].seconds) == {"encode", "search", "aggregate"}
    assert all(seconds > 0 for seconds in costs[0].seconds.values())


def test_the_table_has_a_version_and_rows_by_task(retriever, uri):
    assert retriever.table_version == ExitTable.open(uri).version >= 1
    assert retriever.rows_by_task == {"sst2": 8, "cr": 2, "mpqa": 2, "mr": 4}


@pytest.mark.parametrize(
    ("lookup", "message"),
    [
        (sst2("x", k=0), "k = 0 is not allowed, it must be at least 1"),
        (sst2("x", k=-3), "k = -3"),
        (sst2("x", budget=0), r"budget 0 is not within \(0, 1\]"),
        (Lookup(("trec",), "x"), r"'trec'.*cr, mpqa, mr, sst2"),  # not finished
        (Lookup(("sst2", "nobody"), "x"), "'nobody'"),
        (Lookup((), "x"), "one or more"),
    ],
)
def test_bad_lookups_are_named(retriever, lookup, message):
    with pytest.raises(RaeeError, match=message):
        retriever.decide([lookup])


def test_table_may_vanish_under_an_open_retriever(uri, encoder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(uri, copy)
    retriever = opened(str(copy), encoder)
    shutil.rmtree(copy)
    assert retriever.decide([sst2(PRAISE[0])])[0].exit_layer == PRAISE_LAYER
    with pytest.raises(TableError, match="no such directory"):
        opened(str(copy), encoder)


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


def test_only_finished_tasks_with_rows_are_served(uri, encoder, tmp_path):
    empty = ExitTable.open_or_create(str(tmp_path / "empty"), metadata(encoder.identity()))
    empty.put_task(entry("sst2"))
    with pytest.raises(TableError, match="holds no task whose build has finished"):
        opened(empty.uri, encoder)
    empty.add("sst2", label_rows(["a"], encoder.encode(["a"])))
    with pytest.raises(TableError, match="holds no task whose build has finished"):
        opened(empty.uri, encoder)
    empty.finish("sst2", Built(1, "one row"), None)
    assert opened(empty.uri, encoder).heads == {"sst2": "plain"}


def test_a_table_without_probes_has_no_probe_set(encoder, tmp_path):
    table = ExitTable.open_or_create(str(tmp_path / "plain"), metadata(encoder.identity()))
    put(table, encoder, "mr", PRAISE, [2] * 4, has_fit=False)
    assert opened(table.uri, encoder).probe_set is None


def test_labels_that_begin_alike_have_probes_and_no_plain_head(encoder, tmp_path):
    task = Task("intents", CompletionPrompt("{text}\nIntent:"), ("card lost", "card stolen"))
    table = ExitTable.open_or_create(str(tmp_path / "intents"), metadata(encoder.identity()))
    table.put_task(TaskEntry.of(task, (), LAYERS))
    own = label_rows(list(map(id_of, PRAISE)), encoder.encode(PRAISE))
    table.add("intents", dataclasses.replace(own, plain_probs=None, full_logprobs=None))
    table.finish("intents", Built(4), made_fit(own.ids, [right_at(2)] * 4))
    retriever = opened(table.uri, encoder)
    assert retriever.plain_token_ids == {} and retriever.heads == {"intents": "probe"}
    lookups = [Lookup(("intents",), PRAISE[0], head=head) for head in (None, "plain")]
    probe, plain = retriever.decide(lookups)
    assert (probe.exit_layer, probe.probe) == (2, "intents/2")
    assert (plain.exit_layer, plain.reason) == (4, Reason.NO_EVIDENCE)


def test_a_retriever_takes_over_the_encoder_of_an_older_one(retriever, uri, encoder):
    later = ExitRetriever.open(uri, backbone=BACKBONE, old=retriever)
    assert later._encoder is retriever._encoder
    assert later.table_state == retriever.table_state
    assert later.decide([sst2(PRAISE[0])])[0].exit_layer == PRAISE_LAYER


def test_a_single_row_knows_its_own_text_only(encoder, tmp_path):
    table = ExitTable.open_or_create(str(tmp_path / "one"), metadata(encoder.identity()))
    put(table, encoder, "sst2", ["a wonderful film"], [2], has_fit=False)
    own, other = opened(table.uri, encoder).decide([sst2("a wonderful film"), sst2("a dull film")])
    assert (own.reason, other.reason) == (Reason.RETRIEVED, Reason.FAR)
