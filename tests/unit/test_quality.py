"""Exits of free text by the quality they keep, from what rows record to what a prompt is given."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raee_serve.cli import main
from raee_serve.errors import BindingError, RaeeError
from raee_serve.records import Reason
from raee_serve.retrieval.aggregate import QUALITY, RULE_NAMES, decide, exits, rule_named
from raee_serve.retrieval.free_text import FreeTextLeaveOneOut
from raee_serve.retrieval.heads import nearest_others
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.retrieval.trust import believed, trust_in
from raee_serve.table.evidence import evidence_of, free_text_quality, kept_quality, most_kept
from raee_serve.table.schema import RuleChoice, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.table.tasks import get_task
from tests.unit.table_rows import BACKBONE, entry, label_rows, metadata, unit_vectors

pytestmark = pytest.mark.unit

RULE = rule_named(QUALITY)
LAYERS, SHORT = (2, 4), (1, 3)


class Maps:
    """In the place of shortcuts, of which a table wants to know these two."""

    layers, digest = SHORT, "0123456789ab"


ENTRY = TaskEntry.of(get_task("xsum"), (), LAYERS, Maps())


def free_text_rows(ids, vectors, kept):
    """kept: [n, 4] share of full depth's hits at 2 plain, 4, 1 and 3 by shortcut."""
    hits = 0.5 * np.array(kept, np.float32)
    return TaskRows(
        ids,
        vectors,
        reference_logprob=np.full_like(hits, -1),
        agreement=np.where(np.arange(4) == 1, 1, hits).astype(np.float32),
        reference_hits=hits,
    )


def test_quality_is_the_share_of_the_reference_that_is_predicted():
    rows = free_text_rows(["a", "b"], unit_vectors(2), [[0.5, 1, 0.25, 0.9], [1.2, 1, 0.1, 1]])
    quality = free_text_quality(rows, ENTRY, 4)
    expected = [[[0, 0.5, 0, 1], [0.25, 0, 0.9, 0]], [[0, 1.2, 0, 1], [0.1, 0, 1, 0]]]
    np.testing.assert_allclose(2 * quality, expected, atol=1e-6)
    kept = kept_quality(quality)
    np.testing.assert_allclose(kept, [[0, 0.85, 0, 1], [0.175, 0, 0.95, 0]], atol=1e-6)
    assert not kept_quality(np.zeros_like(quality)).any()


def test_rows_of_older_versions_go_by_their_agreement(table):
    assert (table.rows("xsum").reference_hits[:, 1] == 0.5).all()
    old = free_text_rows(["old"], unit_vectors(1), [[0.5, 1, 0.25, 0.9]])
    table.add("xsum", dataclasses.replace(old, reference_hits=None))
    rows = ExitTable.open(table.uri).rows("xsum")
    assert rows.reference_hits is None and rows.agreement.shape == (61, 4)
    quality = free_text_quality(rows, ENTRY, 4)
    np.testing.assert_array_equal(quality[:, 0, [1, 3]], rows.agreement[:, :2])
    np.testing.assert_array_equal(quality[:, 1, [0, 2]], rows.agreement[:, 2:])


def test_exit_information_is_the_plain_heads():
    rows = free_text_rows(["a"], unit_vectors(1), [[0.5, 1, 0.25, 0.9]])
    np.testing.assert_allclose(evidence_of(rows, ENTRY, 4), [[0, 0, 0, np.exp(-1)]], atol=1e-6)


def test_the_shallowest_exit_that_keeps_enough_is_taken():
    kept = np.array([[[0.0, 0.8, 0.0, 1.0], [0.3, 0.9, 0.97, 0.0]]] * 3)
    distances = np.array([0.1, 0.1, 0.2])
    for quality, expected in [
        (0.2, (1, 1)),
        (0.85, (2, 1)),
        (0.95, (3, 1)),
        (0.98, (4, 0)),
        (1.0, (4, 0)),
    ]:
        assert decide(RULE, kept, distances, fraction=quality) == expected


def test_full_depth_that_predicts_nothing_is_no_measure():
    kept = np.zeros((2, 2, 4))
    kept[:, 1, 1] = 0.5
    assert decide(RULE, kept, np.array([0.1, 0.1]), fraction=0.5) == (4, 0)
    assert decide(RULE, np.zeros((2, 2, 4)), np.array([0.1, 0.1]), fraction=0.5) is None


def test_the_nearest_count_for_more():
    kept = np.zeros((2, 2, 4))
    kept[..., 0, 3] = 1
    kept[:, 1, 1] = 1.0, 0.5
    assert decide(RULE, kept, np.array([0.1, 0.9]), fraction=0.9) == (2, 1)  # expects 0.95
    assert decide(RULE, kept, np.array([0.5, 0.5]), fraction=0.9) == (4, 0)  # expects 0.75


shares = arrays(np.float32, (3, 5, 2, 6), elements=st.floats(0, 1, width=32))
gaps = arrays(np.float32, (3, 5), elements=st.floats(0, 2, width=32))


@given(shares, gaps, st.floats(0.01, 1), st.floats(0.01, 1))
def test_less_quality_never_goes_deeper(kept, distances, one, other):
    kept[..., 0, -1] = 1  # full depth keeps all of itself
    shallow, deep = (exits(RULE, kept, distances, fraction=q)[0] for q in sorted((one, other)))
    assert (shallow <= deep).all() and (shallow >= 1).all()


@given(shares, gaps, st.floats(0.01, 1))
def test_what_is_taken_is_expected_to_keep_enough(kept, distances, quality):
    kept[..., 0, -1] = 1
    layers, heads = exits(RULE, kept, distances, fraction=quality)
    weights = 1 / np.maximum(distances.astype(float), 1e-4)
    expected = (kept.astype(float) * weights[..., None, None]).sum(axis=1)
    expected /= weights.sum(axis=1)[:, None, None]
    for prompt, (layer, head) in enumerate(zip(layers, heads, strict=True)):
        assert layer == 6 or expected[prompt, head, layer - 1] >= quality - 1e-6
        assert (expected[prompt, :, : layer - 1] < quality + 1e-6).all()


def test_the_rule_is_one_of_the_names():
    assert QUALITY in RULE_NAMES
    with pytest.raises(RaeeError, match=r"known rules: .*quality"):
        rule_named("best")


@pytest.fixture(scope="module")
def rows():
    """Rows of one half of space keep all at layer 1 by shortcut, the others only at layer 3."""
    vectors = unit_vectors(60)
    vectors[:, 0] += np.sign(vectors[:, 0])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    easy = vectors[:, 0] > 0
    kept = np.where(easy[:, None], [0.5, 1, 1.0, 1.0], [0.5, 1, 0.2, 0.96])
    return free_text_rows([str(n) for n in range(60)], vectors, kept)


@pytest.fixture
def table(uri, rows):
    table = ExitTable.open_or_create(uri, metadata())
    table.put_task(ENTRY)
    table.add("xsum", rows)
    return table


def test_each_row_is_asked_as_if_the_table_did_not_hold_it(rows):
    quality = free_text_quality(rows, ENTRY, 4)
    own = FreeTextLeaveOneOut(rows.vectors, evidence_of(rows, ENTRY, 4), quality)
    k, layers = 5, []
    choice = RuleChoice(QUALITY, k, 0.95, 2.0, quality=0.9)
    trust = trust_in(quality, nearest_others(rows.vectors, np.arange(60), rows.vectors, k))
    told = believed(quality, trust)
    similarities = rows.vectors @ rows.vectors.T
    for i in range(60):
        others = np.delete(np.arange(60), i)
        near = others[np.argsort(-similarities[i, others], kind="stable")[:k]]
        layers.append(decide(RULE, told[near], 1 - similarities[i, near], fraction=0.9)[0])
    assert own.layers(choice).tolist() == layers and len(set(layers)) > 1
    outcome = own.outcome(choice)
    assert outcome.depth == pytest.approx(np.mean(layers) / 4)
    assert 0.2 < outcome.accuracy <= 1
    names = [what for _, _, what in own.fixed_exits()]
    assert names == [f"layer {n} for all, plain" for n in LAYERS] + [
        f"layer {n} for all, shortcut" for n in SHORT
    ]


def test_calibrate_stores_what_keeps_the_quality(table, capsys):
    command = ["calibrate", "--table", table.uri, "--task", "xsum", "--budget"]
    assert main([*command, "quality>=0.9"]) == 0
    told = capsys.readouterr().out
    assert "layer 3 for all, shortcut" in told
    found = float(re.search(r"chosen for quality >= 0.9: quality ([0-9.]+) at", told)[1])
    choice = ExitTable.open(table.uri).metadata.choices["xsum"]
    assert found >= 0.9 and choice.rule == QUALITY and 0 < choice.quality <= 1
    assert main([*command, "accuracy>=0.9"]) == 1
    assert "does not fit xsum, a free-text task; allowed: 'quality>=X'" in capsys.readouterr().err


def test_a_stored_quality_comes_back(table):
    for quality in (0.95, 0.8):
        choice = RuleChoice(QUALITY, 12, 0.95, 2.0, quality)
        table.put_choices({"xsum": choice})
        assert ExitTable.open(table.uri).metadata.choices["xsum"] == choice


TRAVEL = ["the train was late again", "a train to the coast", "trains and ferries"]
FOOD = ["the soup was cold", "a soup with bread", "bread and soup"]


@pytest.fixture
def served(tmp_path, encoder):
    """xsum: travel exits at layer 1 by shortcut, food at 3; cnndm: without shortcuts; sst2."""
    table = ExitTable.open_or_create(str(tmp_path / "t"), metadata(encoder.identity()))
    table.put_task(ENTRY)
    kept = [[0.9, 1, 0.97, 0.99]] * 3 + [[0.9, 1, 0.2, 0.96]] * 3
    texts = TRAVEL + FOOD
    table.add("xsum", free_text_rows(texts, encoder.encode(texts), kept))
    table.put_task(entry("cnndm"))
    plain = free_text_rows(TRAVEL, encoder.encode(TRAVEL), kept[:3])
    plain = TaskRows(
        plain.ids,
        plain.vectors,
        reference_logprob=plain.reference_logprob[:, :2],
        agreement=plain.agreement[:, :2],
        reference_hits=plain.reference_hits[:, :2],
    )
    table.add("cnndm", plain)
    table.put_task(entry("sst2"))
    table.add("sst2", label_rows(FOOD, encoder.encode(FOOD)))
    return table.uri


def opened(uri, encoder, **options):
    options = {"shortcuts": Maps(), "max_distance": 2.0, **options}
    return ExitRetriever.open(uri, backbone=BACKBONE, encoder=encoder, **options)


def exit_of(retriever, text, **options):
    candidates = options.pop("candidates", ("xsum",))
    [decision] = retriever.decide([Lookup(candidates, text, **{"k": 3, **options})])
    assert decision.reason is Reason.RETRIEVED
    return decision.exit_layer, decision.exit_head


def test_prompts_get_the_exits_of_their_neighbours(served, encoder):
    retriever = opened(served, encoder)
    assert exit_of(retriever, TRAVEL[0]) == (1, "shortcut")
    assert exit_of(retriever, FOOD[0]) == (3, "shortcut")
    assert exit_of(retriever, FOOD[0], quality=0.85) == (2, "plain")
    assert exit_of(retriever, FOOD[0], quality=0.99) == (4, "plain")
    assert exit_of(retriever, TRAVEL[0], min_layer=2) == (3, "shortcut")
    assert exit_of(retriever, TRAVEL[0], rule="earliest") == (4, "plain")
    assert exit_of(retriever, TRAVEL[0], candidates=("cnndm",), quality=0.8) == (2, "plain")


def test_the_servers_quality_is_the_default(served, encoder):
    assert exit_of(opened(served, encoder, quality=0.85), FOOD[0]) == (2, "plain")
    with pytest.raises(RaeeError, match=r"not within \(0, 1\]"):
        exit_of(opened(served, encoder), FOOD[0], quality=1.5)


def test_why_is_told_by_exit_head(served, encoder):
    lookup = Lookup(("xsum",), TRAVEL[0], k=2, explain=True)
    [decision] = opened(served, encoder).decide([lookup])
    told = decision.explanation
    assert (told.choice.rule, told.choice.quality) == (QUALITY, 0.95)
    assert told.scores["plain"] == pytest.approx([0, 0.9, 0, 1], abs=1e-5)
    assert told.scores["shortcut"] == pytest.approx([0.97, 0, 0.99, 0], abs=1e-5)


def test_what_no_row_keeps_is_not_looked_up(served, encoder):
    retriever = opened(served, encoder)
    retriever.decide([Lookup(("xsum",), "warm up")])
    costs = []
    retriever.observe = costs.append
    lookups = [
        Lookup(("xsum",), "one more text", quality=1.0),
        Lookup(("xsum",), FOOD[0], quality=0.85),
        Lookup(("xsum",), "yet another", quality=1.0, explain=True),
    ]
    unread, read, explained = retriever.decide(lookups)
    assert (unread.reason, unread.exit_layer) == (Reason.NO_EXIT, 4)
    assert (unread.task, unread.distance, unread.explanation) == ("xsum", None, None)
    assert unread.lookup_ms == read.lookup_ms > 0
    assert (read.reason, read.exit_layer) == (Reason.RETRIEVED, 2)
    assert (explained.reason, explained.exit_layer) == (Reason.NO_EXIT, 4)
    assert explained.distance is not None and explained.explanation.scores["plain"][-1] == 1
    [cost] = costs
    assert cost.cache_hits + cost.cache_misses == 2
    [either] = retriever.decide([Lookup(("xsum", "cnndm"), "of either task", quality=1.0)])
    assert (either.reason, either.task, either.distance) == (Reason.NO_EXIT, None, None)
    [one] = retriever.decide([Lookup(("xsum", "cnndm"), "of either task", quality=0.98)])
    assert one.distance is not None  # no row of cnndm keeps as much, but some of xsum do


def test_other_rules_and_label_words_are_always_looked_up(served, encoder):
    lookups = [Lookup(("xsum",), FOOD[0], rule="earliest", quality=1.0)]
    lookups += [Lookup(("sst2",), FOOD[0], quality=1.0)]
    decisions = opened(served, encoder).decide(lookups)
    assert all(decision.distance is not None for decision in decisions)


@given(
    arrays(np.float32, (5, 2, 4), elements=st.floats(0, 1, width=32)),
    arrays(np.float32, 5, elements=st.floats(0, 2, width=32)),
    st.integers(1, 4),
)
def test_neighbours_never_say_more_than_the_best_row(quality, distances, min_layer):
    quality[:, :, :-1] *= 0.4  # so that no exit keeps all on any row
    quality[:, 0, -1] = np.maximum(quality[:, 0, -1], 0.5)
    quality[:, 1, -1] = 0  # full depth has no shortcut
    most = most_kept(quality)
    assert most < 0.81
    for asked in (most * 1.001 + 1e-9, 1.0):
        layer, _ = exits(RULE, quality[:, :, min_layer - 1 :], distances, fraction=asked)
        assert layer in (5 - min_layer, 0), (asked, most)


def test_most_kept_without_exits_or_without_full_depth():
    assert most_kept(np.ones((3, 2, 1), np.float32)) == 0
    hits = np.array([[[0.5, 0.0]], [[0.2, 0.4]]], np.float32)
    assert most_kept(hits) == np.inf and most_kept(hits[1:]) == pytest.approx(0.5)


def test_label_words_keep_their_own_rule(served, encoder):
    retriever = opened(served, encoder)
    assert retriever.rule_for("sst2", QUALITY) == "stacked"
    assert retriever.rule_for("xsum", None) == QUALITY
    lookups = [Lookup(("sst2",), FOOD[0], rule=rule) for rule in (QUALITY, None)]
    one, other = retriever.decide(lookups)
    assert (one.exit_layer, one.head, one.label_bias) == (
        other.exit_layer,
        other.head,
        other.label_bias,
    )
    assert one.exit_head == "plain"


def test_rows_of_shortcuts_that_the_engine_lacks_are_refused(served, encoder):
    with pytest.raises(BindingError, match=r"through shortcuts 0123456789ab .*not through none"):
        opened(served, encoder, shortcuts=None)
