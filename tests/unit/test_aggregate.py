"""The rules on worked examples, and properties that hold for any neighbours."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raee_serve.errors import RaeeError
from raee_serve.retrieval import aggregate
from raee_serve.retrieval.aggregate import (
    MIN_DISTANCE,
    NO_EVIDENCE,
    RULES,
    exits,
    neighbour_weights,
    rule_named,
)

pytestmark = pytest.mark.unit

PLAIN_RULES = ("earliest", "published")
rules = st.sampled_from(PLAIN_RULES)


def exit_layers(rule, evidence, distances, **options):
    """Of one head: evidence [..., k, num_layers]."""
    return exits(rule_named(rule), evidence[..., None, :], distances, **options)[0]


def decide(rule, evidence, distances, **options):
    chosen = aggregate.decide(rule_named(rule), evidence[:, None], distances, **options)
    return None if chosen is None else chosen[0]


@st.composite
def neighbours(draw):
    """evidence [k, num_layers] with many exact zeros, distances [k]."""
    k, layers = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    probability = st.one_of(st.just(0.0), st.floats(0.01, 1.0))
    evidence = draw(arrays(np.float64, (k, layers), elements=probability))
    distances = draw(arrays(np.float64, k, elements=st.floats(0.0, 2.0)))
    return evidence, distances


@given(rules, neighbours())
def test_exit_is_a_layer_that_answers_some_neighbour(rule, case):
    evidence, distances = case
    layer = decide(rule, evidence, distances)
    if not evidence.any():
        assert layer is None
    else:
        assert 1 <= layer <= evidence.shape[1]
        assert evidence[:, layer - 1].any()


@given(rules, neighbours(), st.sets(st.integers(1, 8)))
def test_points_are_at_or_after_the_exit_wanted(rule, case, inner):
    evidence, distances = case
    num_layers = evidence.shape[1]
    points = sorted({p for p in inner if p < num_layers} | {num_layers})
    free = decide(rule, evidence, distances)
    at_point = decide(rule, evidence, distances, points=points)
    if free is None:
        assert at_point is None
    else:
        assert at_point in points and at_point >= free
        assert at_point == free or free not in points
        assert at_point == num_layers or evidence[:, at_point - 1].any()


@given(rules, neighbours())
def test_a_wrong_neighbour_changes_nothing_unless_it_is_nearest(rule, case):
    evidence, distances = case
    wrong = np.zeros((1, evidence.shape[1]))
    more = np.concatenate([evidence, wrong]), np.append(distances, distances.max())
    assert decide(rule, *more) == decide(rule, evidence, distances)


@given(neighbours())
def test_earliest_is_no_later_than_the_best_layer_and_grows_with_fraction(case):
    layers = [exit_layers("earliest", *case, fraction=f) for f in (0.25, 0.5, 0.95, 1.0)]
    assert layers == sorted(layers)


@given(rules, st.lists(neighbours(), min_size=2, max_size=4))
def test_a_batch_decides_as_its_prompts_alone(rule, cases):
    shape = cases[0][0].shape
    same = [case for case in cases if case[0].shape == shape]
    evidence, distances = (np.stack(parts) for parts in zip(*same, strict=True))
    alone = [decide(rule, *case) or NO_EVIDENCE for case in same]
    assert exit_layers(rule, evidence, distances).tolist() == alone


@given(arrays(np.float64, 5, elements=st.floats(0.0, 2.0)))
def test_weights_fall_with_distance(distances):
    weights = neighbour_weights(distances)
    assert weights.max() == 1 and (weights > 0).all()
    order = np.argsort(distances)
    assert (np.diff(weights[order]) <= 0).all()


def test_weights_are_the_ratio_to_the_nearest():
    np.testing.assert_allclose(neighbour_weights(np.array([0.2, 0.4, 0.1])), [0.5, 0.25, 1])


def test_exact_match_outweighs_the_others_without_dividing_by_zero():
    weights = neighbour_weights(np.array([0.0, -1e-7, 0.1], np.float32))
    np.testing.assert_allclose(weights, [1, 1, MIN_DISTANCE / 0.1], rtol=1e-6)


def test_published_counts_confident_pairs_only_where_there_are_some():
    # Layer 2 is within 95% of layer 3, but just short of confident: it does not count at all.
    evidence = np.array([[0.0, 0.89, 0.9]] * 2)
    assert decide("published", evidence, np.array([0.1, 0.1])) == 3
    assert decide("earliest", evidence, np.array([0.1, 0.1])) == 2


def test_published_keeps_three_pairs_of_a_neighbour_without_a_confident_one():
    # Kept: layers 2-4. The second neighbour adds 0.3 to layer 1 alone.
    evidence = np.array([[0.4, 0.5, 0.5, 0.6], [0.3, 0, 0, 0]])
    assert decide("published", evidence, np.array([0.1, 0.1])) == 4
    assert decide("earliest", evidence, np.array([0.1, 0.1])) == 1


def test_published_breaks_ties_to_the_earliest_layer():
    assert decide("published", np.array([[0, 0.95, 0.95]]), np.array([0.3])) == 2
    assert decide("published", np.array([[0.5, 0.5, 0.5, 0.5]]), np.array([0.3])) == 1


def test_weights_decide_between_disagreeing_neighbours():
    evidence = np.array([[0.6, 0, 0], [0, 0, 0.9], [0, 0, 0.9]])
    for rule in PLAIN_RULES:
        assert decide(rule, evidence, np.array([0.1, 0.4, 0.4])) == 1
        assert decide(rule, evidence, np.array([0.1, 0.1, 0.1])) == 3


def test_earliest_takes_the_first_layer_within_the_fraction():
    evidence = np.array([[0.5, 0.94, 0.96, 1.0]])
    assert decide("earliest", evidence, np.array([0.3])) == 3
    assert decide("earliest", evidence, np.array([0.3]), fraction=0.9) == 2
    assert decide("earliest", evidence, np.array([0.3]), fraction=1.0) == 4


def test_bad_input_is_named():
    evidence, distances = np.ones((2, 3)), np.ones(2)
    with pytest.raises(RaeeError, match=r"'median'; known rules: published, earliest"):
        rule_named("median")
    with pytest.raises(RaeeError, match=r"\(2, 1, 3\) does not fit distances \(3,\)"):
        decide("earliest", evidence, np.ones(3))
    with pytest.raises(RaeeError, match=r"\(0, 1, 3\)"):
        decide("earliest", np.ones((0, 3)), np.ones(0))
    with pytest.raises(RaeeError, match=r"fraction 0 is not within \(0, 1\]"):
        decide("earliest", evidence, distances, fraction=0)


def test_a_layer_is_judged_by_its_best_head():
    # Head 0 alone would exit at layer 3; head 1 reaches nearly as much at layer 2.
    evidence = np.array([[[0.1, 0.2, 0.9], [0.3, 0.88, 0.1]]] * 2)
    rule = RULES["calibrated"]
    assert aggregate.decide(rule, evidence, np.array([0.1, 0.1])) == (2, 1)
    assert aggregate.decide(rule, evidence, np.array([0.1, 0.1]), fraction=1.0) == (3, 0)


def test_of_equal_heads_the_first_is_taken():
    evidence = np.full((2, 2, 3), 0.5)
    assert aggregate.decide(RULES["calibrated"], evidence, np.array([0.1, 0.1])) == (1, 0)
