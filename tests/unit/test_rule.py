"""The rule and the paper's, against the definitions spelled out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raee_serve.errors import RaeeError
from raee_serve.exits.choice import Choice
from raee_serve.exits.rule import (
    CONFIDENT,
    MIN_DISTANCE,
    NO_EVIDENCE,
    TOP_PAIRS,
    expected,
    published,
    shallowest,
)

pytestmark = pytest.mark.unit

LAYERS = 6
probability = st.one_of(st.just(0.0), st.floats(0.01, 1.0), st.sampled_from([0.6, 0.88, 0.9, 0.95]))
scores_of = arrays(np.float64, (2, LAYERS), elements=probability)
budgets = st.floats(0.01, 1.0)
some_points = st.sets(st.integers(1, LAYERS - 1)).map(lambda own: sorted(own | {LAYERS}))


def by_hand(scores, budget, points):
    """The earliest layer that may be chosen and is good enough; full depth if none is."""
    best = scores.max()
    if best <= 0:
        return NO_EVIDENCE
    for layer in points:
        if scores[:, layer - 1].max() >= budget * best:
            return layer
    return LAYERS


@given(scores_of, budgets)
def test_the_exit_is_the_earliest_layer_that_reaches_the_budget(scores, budget):
    layer, head = shallowest(scores, budget)
    assert layer == by_hand(scores, budget, range(1, LAYERS + 1))
    if layer != NO_EVIDENCE:
        assert scores[head, layer - 1] == scores[:, layer - 1].max() >= budget * scores.max()


@given(scores_of, budgets, some_points)
def test_at_points_it_is_the_earliest_of_these(scores, budget, points):
    layer, head = shallowest(scores, budget, points)
    assert layer == by_hand(scores, budget, points)
    if layer != NO_EVIDENCE:
        assert layer in points and scores[head, layer - 1] == scores[:, layer - 1].max()
        assert layer >= shallowest(scores, budget)[0]


@given(scores_of, budgets, budgets)
def test_a_larger_budget_never_goes_shallower(scores, one, other):
    first, second = (shallowest(scores, budget)[0] for budget in sorted((one, other)))
    assert first <= second


@given(arrays(np.float64, (4, 2, LAYERS), elements=probability), budgets, some_points)
def test_a_batch_decides_as_its_prompts_alone(scores, budget, points):
    layers, heads = shallowest(scores, budget, points)
    alone = [shallowest(own, budget, points) for own in scores]
    assert [(int(a), int(b)) for a, b in zip(layers, heads, strict=True)] == [
        (int(layer), int(head)) for layer, head in alone
    ]


def test_worked_examples():
    one = np.array([[0.5, 0.94, 0.96, 1.0]])
    assert [shallowest(one, b)[0] for b in (0.95, 0.9, 1.0, 0.5)] == [3, 2, 4, 1]
    two = np.array([[0.1, 0.2, 0.9], [0.3, 0.88, 0.1]])
    assert shallowest(two, 0.95) == (2, 1) and shallowest(two, 1.0) == (3, 0)
    assert shallowest(np.full((2, 3), 0.5), 0.9) == (1, 0)  # of equal heads the first
    assert shallowest(np.zeros((1, 3)), 0.9)[0] == NO_EVIDENCE
    best_is_no_point = np.array([[0.1, 1.0, 0.2, 0.3]])
    assert shallowest(best_is_no_point, 0.9, [3, 4])[0] == 4


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, float("nan")])
def test_budgets_outside_are_named(budget):
    with pytest.raises(RaeeError, match=r"budget .* is not within \(0, 1\]"):
        shallowest(np.ones((1, 3)), budget)
    with pytest.raises(RaeeError, match=r"budget .* is not within \(0, 1\]"):
        Choice(3, budget)


def test_choices():
    assert Choice.default("labels") == Choice(256, 0.98)
    assert Choice.default("free-text") == Choice(24, 0.95)
    assert str(Choice(12, 0.9)) == "budget 0.9, 12 neighbours"
    with pytest.raises(RaeeError, match="k = 0 is not allowed"):
        Choice(0, 0.9)


@given(
    arrays(np.float32, (3, 5, 2, 4), elements=st.floats(0, 1, width=32)),
    arrays(np.float64, (3, 5), elements=st.floats(0, 1)),
)
def test_expectation_is_the_weighted_sum(evidence, weights):
    found = expected(evidence, weights)
    by_loop = np.zeros((3, 2, 4))
    for prompt in range(3):
        for near in range(5):
            by_loop[prompt] += weights[prompt, near] * evidence[prompt, near].astype(float)
    np.testing.assert_allclose(found, by_loop, atol=1e-12)


@st.composite
def neighbours(draw):
    """evidence [k, num_layers] with many exact zeros, distances [k]."""
    k, layers = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    evidence = draw(arrays(np.float64, (k, layers), elements=probability))
    return evidence, draw(arrays(np.float64, k, elements=st.floats(0.0, 2.0)))


def as_in_the_paper(evidence, distances):
    """HugeRaabbit/RAEE, line by line: a dictionary of layers and the sum of what counts."""
    clipped = [max(distance, MIN_DISTANCE) for distance in distances]
    sums = {}
    for own, distance in zip(evidence, clipped, strict=True):
        pairs = [(layer, p) for layer, p in enumerate(own, 1) if p >= CONFIDENT]
        if not pairs:
            pairs = sorted(enumerate(own, 1), key=lambda pair: -pair[1])[:TOP_PAIRS]
        for layer, p in pairs:
            sums[layer] = sums.get(layer, 0) + p * (min(clipped) / distance)
    best = max(sums.values())
    return min(layer for layer, own in sums.items() if own == best) if best > 0 else NO_EVIDENCE


@given(neighbours())
def test_the_published_rule_is_the_papers(case):
    evidence, distances = case
    found, literal = int(published(evidence, distances)), as_in_the_paper(evidence, distances)
    if found != literal:  # sums that differ in the last bit alone
        nudged = evidence * (1 - 1e-9 * np.arange(evidence.shape[1]))
        assert int(published(nudged, distances)) == as_in_the_paper(nudged, distances)


@given(st.lists(neighbours(), min_size=2, max_size=4))
def test_the_published_rule_decides_a_batch_as_its_prompts_alone(cases):
    same = [case for case in cases if case[0].shape == cases[0][0].shape]
    evidence, distances = (np.stack(parts) for parts in zip(*same, strict=True))
    assert published(evidence, distances).tolist() == [int(published(*case)) for case in same]


def test_published_counts_confident_pairs_only_where_there_are_some():
    # Just short of confident, the first neighbour's layer 1 does not count at all.
    assert published(np.array([[0.89, 0.95], [0.9, 0.0]]), np.array([0.1, 0.1])) == 2
    assert published(np.array([[0.89, 0.89], [0.9, 0.0]]), np.array([0.1, 0.1])) == 1


def test_published_keeps_three_pairs_of_a_neighbour_without_a_confident_one():
    # Kept: layers 2-4. The second neighbour adds 0.3 to layer 1 alone.
    evidence = np.array([[0.4, 0.5, 0.5, 0.6], [0.3, 0, 0, 0]])
    assert published(evidence, np.array([0.1, 0.1])) == 4


def test_published_breaks_ties_to_the_earliest_layer():
    assert published(np.array([[0, 0.95, 0.95]]), np.array([0.3])) == 2
    assert published(np.array([[0.5, 0.5, 0.5, 0.5]]), np.array([0.3])) == 1


def test_published_weighs_neighbours_by_distance():
    evidence = np.array([[0.6, 0, 0], [0, 0, 0.9], [0, 0, 0.9]])
    assert published(evidence, np.array([0.1, 0.4, 0.4])) == 1
    assert published(evidence, np.array([0.1, 0.1, 0.1])) == 3
    exact = np.array([0.0, -1e-7, 0.1], np.float32)  # no division by zero
    assert published(evidence, exact) == 3
