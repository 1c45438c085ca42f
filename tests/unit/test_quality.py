"""Exits of free text by the quality they keep, from what rows record to what a prompt is given."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raee_serve.cli import main
from raee_serve.errors import BindingError, RaeeError
from raee_serve.exits.choice import Choice
from raee_serve.exits.neighbours import evidence_weights
from raee_serve.exits.rule import expected, shallowest
from raee_serve.exits.shrinkage import kept_quality
from raee_serve.records import Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.table.evidence import free_text_quality, most_kept
from raee_serve.table.schema import TaskEntry
from raee_serve.table.store import ExitTable
from raee_serve.tasks.registry import get_task
from tests.unit.exit_tables import free_text_rows, new_table, put_free_text
from tests.unit.table_rows import BACKBONE, add_all, fitting_rows, metadata, unit_vectors

pytestmark = pytest.mark.unit

LAYERS, SHORT = (2, 4), (1, 3)


class Maps:
    """In the place of shortcuts, of which a table wants to know these two."""

    layers, digest = SHORT, "0123456789ab"


ENTRY = TaskEntry.of(get_task("xsum"), (), LAYERS, Maps())


def rows_that_keep(kept, vectors=None):
    """kept: [n, 4] share of full depth's hits at 2 plain, 4, 1 and 3 by shortcut."""
    return free_text_rows(0.5 * np.array(kept), vectors)


def test_quality_is_the_share_of_the_reference_that_is_predicted():
    rows = rows_that_keep([[0.5, 1, 0.25, 0.9], [1.2, 1, 0.1, 1]])
    quality = free_text_quality(rows, ENTRY, 4)
    by_exit = [[[0, 0.5, 0, 1], [0.25, 0, 0.9, 0]], [[0, 1.2, 0, 1], [0.1, 0, 1, 0]]]
    np.testing.assert_allclose(2 * quality, by_exit, atol=1e-6)
    kept = kept_quality(quality)
    np.testing.assert_allclose(kept, [[0, 0.85, 0, 1], [0.175, 0, 0.95, 0]], atol=1e-6)
    assert not kept_quality(np.zeros_like(quality)).any()


@given(
    arrays(np.float32, (5, 2, 4), elements=st.floats(0, 1, width=32)),
    arrays(np.float32, 5, elements=st.floats(-1, 1, width=32)),
    st.integers(1, 4),
)
def test_neighbours_never_say_more_than_the_best_row(quality, similarities, min_layer):
    quality[:, :, :-1] *= 0.4  # so that no exit keeps all on any row
    quality[:, 0, -1] = np.maximum(quality[:, 0, -1], 0.5)
    quality[:, 1, -1] = 0  # full depth has no shortcut
    most = most_kept(quality)
    assert most < 0.81
    scores = expected(quality, evidence_weights(similarities))[:, min_layer - 1 :]
    for budget in (most * 1.001 + 1e-9, 1.0):
        assert shallowest(scores, budget)[0] == 5 - min_layer, (budget, most)


def test_most_kept_without_exits_or_without_full_depth():
    assert most_kept(np.ones((3, 2, 1), np.float32)) == 0
    hits = np.array([[[0.5, 0.0]], [[0.2, 0.4]]], np.float32)
    assert most_kept(hits) == np.inf and most_kept(hits[1:]) == pytest.approx(0.5)


@pytest.fixture
def table(uri):
    """Rows of one half of space keep all at layer 1 by shortcut, the others only at layer 3."""
    vectors = unit_vectors(60)
    vectors[:, 0] += np.sign(vectors[:, 0])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept = np.where(vectors[:, :1] > 0, [0.5, 1, 1.0, 1.0], [0.5, 1, 0.2, 0.96])
    table = new_table(uri)
    put_free_text(table, "xsum", rows_that_keep(kept, vectors), LAYERS, Maps())
    return table


def test_calibrate_stores_what_keeps_the_quality(table, capsys):
    command = ["calibrate", "--table", table.uri, "--task", "xsum", "--budget"]
    assert main([*command, "quality>=0.9"]) == 0
    told = capsys.readouterr().out
    names = [f"layer {n} for all, plain" for n in LAYERS]
    names += [f"layer {n} for all, shortcut" for n in SHORT]
    assert all(name in told for name in names)
    found = float(re.search(r"chosen for quality >= 0.9: quality ([0-9.]+) at", told)[1])
    choice = ExitTable.open(table.uri).metadata.choices["xsum"]
    assert found >= 0.9 and f"stored {choice} in" in told
    assert main([*command, "accuracy>=0.9"]) == 1
    assert "does not fit xsum, a free-text task; allowed: 'quality>=X'" in capsys.readouterr().err


TRAVEL = ["the train was late again", "a train to the coast", "trains and ferries"]
FOOD = ["the soup was cold", "a soup with bread", "bread and soup"]


@pytest.fixture
def served(uri, encoder):
    """xsum: travel exits at layer 1 by shortcut, food at 3; cnndm: without shortcuts; sst2."""
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    kept = [[0.9, 1, 0.97, 0.99]] * 3 + [[0.9, 1, 0.2, 0.96]] * 3
    rows = rows_that_keep(kept, encoder.encode(TRAVEL + FOOD))
    put_free_text(table, "xsum", rows, LAYERS, Maps())
    put_free_text(table, "cnndm", free_text_rows([[0.45, 0.5]] * 3, encoder.encode(TRAVEL)))
    vectors = encoder.encode([f"{text}, {n}" for n in range(20) for text in FOOD])
    add_all(table, "sst2", fitting_rows(vectors=vectors))
    return uri


def opened(uri, encoder, **options):
    options = {"shortcuts": Maps(), "max_distance": 2.0, **options}
    return ExitRetriever.open(uri, backbone=BACKBONE, encoder=encoder, **options)


def exit_of(retriever, text, **options):
    candidates = options.pop("candidates", ("xsum",))
    [decision] = retriever.decide([Lookup(candidates, text, **{"k": 3, **options})])
    assert decision.reason is Reason.RETRIEVED
    return decision.exit_layer, decision.head


def test_prompts_get_the_exits_of_their_neighbours(served, encoder):
    retriever = opened(served, encoder)
    assert exit_of(retriever, TRAVEL[0]) == (1, "shortcut")
    assert exit_of(retriever, FOOD[0]) == (3, "shortcut")
    assert exit_of(retriever, FOOD[0], budget=0.85) == (2, "plain")
    assert exit_of(retriever, FOOD[0], budget=0.99) == (4, "plain")
    assert exit_of(retriever, TRAVEL[0], min_layer=2) == (3, "shortcut")
    assert exit_of(retriever, TRAVEL[0], candidates=("cnndm",), budget=0.8) == (2, "plain")


def test_the_servers_budget_is_the_default(served, encoder):
    assert exit_of(opened(served, encoder, budget=0.85), FOOD[0]) == (2, "plain")
    with pytest.raises(RaeeError, match=r"not within \(0, 1\]"):
        exit_of(opened(served, encoder), FOOD[0], budget=1.5)


def test_a_stored_budget_is_the_tasks_own(served, encoder):
    ExitTable.open(served).put_choices({"xsum": Choice(3, 0.85)})
    retriever = opened(served, encoder)
    assert retriever.choices["xsum"] == Choice(3, 0.85)
    assert exit_of(retriever, FOOD[0]) == (2, "plain")


def test_why_is_told_by_exit_head(served, encoder):
    lookup = Lookup(("xsum",), TRAVEL[0], k=2, explain=True)
    [decision] = opened(served, encoder).decide([lookup])
    told = decision.explanation
    assert told.choice == Choice(2, 0.95) and told.certainty is None
    assert told.expected["plain"] == pytest.approx([0, 0.45, 0, 0.5], abs=1e-5)
    assert told.expected["shortcut"] == pytest.approx([0.485, 0, 0.495, 0], abs=1e-5)


def test_what_no_row_keeps_is_not_looked_up(served, encoder):
    retriever = opened(served, encoder)
    retriever.decide([Lookup(("xsum",), "warm up")])
    costs = []
    retriever.observe = costs.append
    lookups = [
        Lookup(("xsum",), "one more text", budget=1.0),
        Lookup(("xsum",), FOOD[0], budget=0.85),
        Lookup(("xsum",), "yet another", budget=1.0, explain=True),
    ]
    unread, read, explained = retriever.decide(lookups)
    assert (unread.reason, unread.exit_layer) == (Reason.NO_EXIT, 4)
    assert (unread.task, unread.distance, unread.explanation) == ("xsum", None, None)
    assert unread.lookup_ms == read.lookup_ms > 0
    assert (read.reason, read.exit_layer) == (Reason.RETRIEVED, 2)
    assert (explained.reason, explained.exit_layer) == (Reason.NO_EXIT, 4)
    assert explained.distance is not None and explained.explanation.expected["plain"][-1] == 0.5
    [cost] = costs
    assert cost.cache_hits + cost.cache_misses == 2
    [either] = retriever.decide([Lookup(("xsum", "cnndm"), "of either task", budget=1.0)])
    assert (either.reason, either.task, either.distance) == (Reason.NO_EXIT, None, None)
    [one] = retriever.decide([Lookup(("xsum", "cnndm"), "of either task", budget=0.98)])
    assert one.distance is not None  # no row of cnndm keeps as much, but some of xsum do


def test_labels_are_always_looked_up(served, encoder):
    [decision] = opened(served, encoder).decide([Lookup(("sst2",), FOOD[0], budget=1.0)])
    assert decision.distance is not None and decision.head == "probe"


def test_rows_of_shortcuts_that_the_engine_lacks_are_refused(served, encoder):
    with pytest.raises(BindingError, match=r"through shortcuts 0123456789ab .*not through none"):
        opened(served, encoder, shortcuts=None)
