"""Rows of a table, each asked as if the table did not hold it: against the same by hand."""

import numpy as np
import pytest

from raee_serve.errors import TaskError
from raee_serve.exits import neighbours
from raee_serve.exits.choice import PUBLISHED_K, Choice
from raee_serve.exits.neighbours import evidence_weights
from raee_serve.exits.replay import BUDGETS, Outcome, Replay, frontier, shallowest_with
from raee_serve.exits.rule import expected, published, shallowest
from raee_serve.exits.shrinkage import shrunk, trust_in
from raee_serve.records import EXIT_HEADS
from raee_serve.retrieval.replayed import replay_of
from raee_serve.table.schema import Built
from tests.unit.exit_tables import free_text_rows, new_table, put_free_text, put_labels
from tests.unit.table_rows import ENCODER, made_fit, row_ids, unit_vectors

pytestmark = pytest.mark.unit

N, K, NUM_LAYERS = 60, 5, 4
VECTORS = unit_vectors(N)
DRAW = np.random.default_rng(3)
CERTAINTIES = DRAW.uniform(0.5, 1, N).astype(np.float32)


def replay(kind: str, heads: int = 1) -> Replay:
    evidence = DRAW.uniform(0, 1, (N, heads, NUM_LAYERS)).astype(np.float32)
    if kind == "free-text":
        return Replay(kind, VECTORS, evidence, evidence)
    if kind == "plain":
        evidence = np.where(evidence > 0.5, evidence, 0)
    worth = (evidence > 0.5).astype(np.float32)
    return Replay(kind, VECTORS, evidence, worth, CERTAINTIES if kind == "probe" else None)


def others_of(row: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of all others, and their similarities."""
    others = np.delete(np.arange(N), row)
    similarities = VECTORS[others] @ VECTORS[row]
    order = np.argsort(-similarities, kind="stable")[:k]
    return others[order], similarities[order]


def test_probes_are_weighed_by_certainty_too():
    rows, layers = replay("probe"), []
    for row in range(N):
        near, close = others_of(row, K)
        weights = evidence_weights(close, CERTAINTIES[near], CERTAINTIES[row])
        layers.append(int(shallowest(expected(rows.evidence[near], weights), 0.9)[0]))
    found, heads = rows.exits([Choice(K, 0.9)])
    assert found[0].tolist() == layers and len(set(layers)) > 1 and not heads.any()
    [outcome] = rows.outcomes([Choice(K, 0.9)])
    right = rows.worth[np.arange(N), 0, found[0] - 1]
    assert outcome.accuracy == pytest.approx(right.mean())
    assert outcome.depth == pytest.approx(np.mean(layers) / NUM_LAYERS)


def test_the_plain_head_goes_by_the_papers_rule_whatever_the_budget():
    rows, layers = replay("plain"), []
    for row in range(N):
        near, close = others_of(row, PUBLISHED_K)
        layers.append(int(published(rows.evidence[near][:, 0], 1 - close)) or NUM_LAYERS)
    found, _ = rows.exits([Choice(K, 0.5), Choice(K, 1.0)])
    assert found[0].tolist() == found[1].tolist() == layers
    at_points, _ = rows.exits([Choice(K, 0.5)], points=(3, 4))
    assert at_points[0].tolist() == [max(layer, 3) for layer in layers]


def test_free_text_is_shrunk_as_a_look_up_of_so_many_neighbours_has_it():
    rows, layers, heads = replay("free-text", 2), [], []
    found = [others_of(row, K) for row in range(N)]
    near, close = map(np.stack, zip(*found, strict=True))
    told = shrunk(rows.evidence, trust_in(rows.evidence, [(near, close)]))
    for row in range(N):
        scores = expected(told[near[row]], evidence_weights(close[row]))
        layer, head = shallowest(scores, 0.9)
        layers.append(int(layer))
        heads.append(int(head))
    by_k, by_head = rows.exits([Choice(12, 0.9), Choice(K, 0.9)])
    assert by_k[1].tolist() == layers and by_head[1].tolist() == heads
    outcome = rows.outcomes([Choice(K, 0.9)])[0]
    own = rows.worth[np.arange(N), heads, np.array(layers) - 1]
    assert outcome.accuracy == pytest.approx(own.mean() / rows.worth[:, 0, -1].mean())


def test_blocks_change_nothing(monkeypatch):
    rows = replay("probe")
    whole = rows.outcomes(rows.every_choice())
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    assert rows.outcomes(rows.every_choice()) == whole


def test_rows_that_nothing_answers_are_at_full_depth():
    rows = Replay("probe", VECTORS, *np.zeros((2, N, 1, NUM_LAYERS), np.float32), CERTAINTIES)
    assert rows.outcomes([Choice(K, 0.9)]) == [Outcome(Choice(K, 0.9), 0.0, 1.0)]


def test_a_deeper_budget_is_never_shallower():
    rows = replay("probe")
    depths = [o.depth for o in rows.outcomes([Choice(K, budget) for budget in BUDGETS])]
    assert depths == sorted(depths, reverse=True)


def test_points_take_the_next_exit_that_keeps_the_budget():
    evidence = np.tile(np.array([0.2, 0.9, 0.7, 0.95], np.float32), (N, 1, 1))
    rows = Replay("probe", VECTORS, evidence, evidence, CERTAINTIES)
    for points, layer in (((), 2), ((2, 4), 2), ((3, 4), 4)):
        assert set(rows.exits([Choice(K, 0.9)], points)[0][0].tolist()) == {layer}


def test_as_many_neighbours_are_tried_as_there_can_be():
    assert {choice.k for choice in replay("probe").every_choice()} == {64}
    assert {choice.k for choice in replay("free-text", 2).every_choice()} == {12, 24, 48}


def outcome(accuracy: float, depth: float) -> Outcome:
    return Outcome(Choice(K, 0.9), accuracy, depth)


def test_the_frontier_holds_what_nothing_beats():
    best = frontier([outcome(0.7, 0.5), outcome(0.6, 0.6), outcome(0.8, 0.9), outcome(0.7, 0.4)])
    assert [(o.accuracy, o.depth) for o in best] == [(0.7, 0.4), (0.8, 0.9)]


def test_an_accuracy_is_had_at_the_least_depth_or_not_at_all():
    found = [outcome(1.0, 0.9), outcome(0.95, 0.6), outcome(0.8, 0.4)]
    assert [shallowest_with(found, wanted) for wanted in (1.01, 0.96, 0.95, 0.5)] == [None, *found]


def test_what_a_fit_knows_of_the_rows_is_replayed(uri):
    """Two of the rows that it was fitted to are gone from the table, and another one is new."""
    table = new_table(uri)
    probs = DRAW.uniform(0, 1, (N, NUM_LAYERS))
    put_labels(table, "sst2", probs[:-2])
    fit = made_fit(row_ids(N)[1:], probs[1:], dimension=ENCODER.dimension)
    table.finish("sst2", Built(N - 2), fit)
    rows = replay_of(table, "sst2")
    assert rows.kind == "probe" and rows.num_rows == N - 3
    own = [row_ids(N).index(row) for row in table.rows("sst2").ids if row != row_ids(1)[0]]
    np.testing.assert_allclose(rows.evidence[:, 0], probs[own], rtol=1e-6)
    np.testing.assert_array_equal(rows.worth, rows.evidence > 0.5)


def test_tasks_without_a_fit(uri):
    table = new_table(uri)
    put_labels(table, "sst2", [[0.2, 0.9, 0.6, 0.4]] * 20, has_fit=False)
    put_free_text(table, "xsum", free_text_rows([[0.3, 0.4]] * 3))
    put_labels(table, "cr", [[0.5] * 4], has_fit=False)
    plain = replay_of(table, "sst2")
    assert plain.kind == "plain" and plain.worth[0, 0].tolist() == [0, 1, 1, 0]
    assert replay_of(table, "sst2", most_rows=5).num_rows == 5
    text = replay_of(table, "xsum")
    assert text.kind == "free-text" and text.evidence.shape == (3, len(EXIT_HEADS), 4)
    with pytest.raises(TaskError, match="cr has 1 rows in the table; at least 2 are needed"):
        replay_of(table, "cr")
