"""A task's fit: what it says of its rows it says without them, and it comes back as it was."""

import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raee_serve.errors import TableError
from raee_serve.exits import fit as fit_module
from raee_serve.exits import neighbours
from raee_serve.exits.fit import ALONE, FEWEST_ROWS, TaskFit, fit_task, probe_set, why_not
from raee_serve.exits.neighbours import log_votes
from raee_serve.exits.probes import Probe, packed, unpacked
from raee_serve.exits.ridge import FOLDS, FoldedRidge, fold_of
from raee_serve.exits.voices import softmax
from tests.unit.table_rows import LAYERS, made_fit, row_ids, states_for, unit_vectors

pytestmark = pytest.mark.unit

N = 200
GOLDS = (np.arange(N) % 2).astype(np.int32)
IDS = row_ids(N)


def fitted(states, golds=GOLDS, vectors=None, ids=IDS, num_labels=2, **options):
    """states: [n, layers, hidden_size]."""
    vectors = unit_vectors(len(ids)) if vectors is None else vectors
    by_layer = states.astype(np.float16).transpose(1, 0, 2)
    layers = tuple(range(1, len(by_layer) + 1))
    return fit_task(
        layers, lambda layer: by_layer[layer - 1], vectors, golds, ids, num_labels, **options
    )


@pytest.fixture(scope="module")
def telling():
    """Fitted to states that tell the labels apart from layer 2 on."""
    return fitted(states_for(GOLDS))


def test_what_is_said_of_rows_is_out_of_fold():
    """As many features as there are rows: whatever was fitted to them would answer all of them."""
    noise = np.random.default_rng(0).normal(size=(N, 2, 2 * N))
    folds = np.array([fold_of(row_id) for row_id in IDS])
    in_sample = FoldedRidge(noise[:, 0], GOLDS, 2, folds).probe(100.0).scores(noise[:, 0])
    assert (in_sample.argmax(axis=1) == GOLDS).mean() > 0.95
    found = fitted(noise)
    assert (found.is_right.mean(axis=0) < 0.6).all()
    assert (found.exit_probs.mean(axis=0) < 0.55).all()


def test_vectors_are_heard_out_of_fold_too():
    wide = unit_vectors(N, 2 * N)
    found = fitted(np.zeros((N, 1, 4)), vectors=wide)
    assert found.is_right.mean() < 0.6 and found.certainties.mean() < 0.65


def test_from_the_layer_on_that_tells_rows_are_answered(telling):
    assert telling.layers == LAYERS and telling.num_labels == 2 and telling.ids == tuple(IDS)
    assert (telling.is_right[:, 0].mean() < 0.65) and (telling.is_right[:, 1:].mean() > 0.98)
    assert (telling.exit_probs[:, 1:].mean(axis=0) > 0.9).all()
    assert telling.is_right[telling.exit_probs > 0.5].all()  # of two labels
    assert not telling.is_right[telling.exit_probs < 0.5].any()
    assert telling.exit_probs.dtype == np.float32 and telling.certainties.shape == (N,)
    assert ((telling.certainties >= 0.5) & (telling.certainties <= 1)).all()


def test_a_probe_answers_what_it_has_not_seen(telling):
    golds = GOLDS[::-1]
    states = states_for(golds, seed=9).astype(np.float32)
    for layer, probe in zip(telling.layers[1:], telling.probes[1:], strict=True):
        assert (probe.scores(states[:, layer - 1]).argmax(axis=1) == golds).mean() > 0.98
    alone = telling.alone.scores(states[:, -1])
    assert (alone.argmax(axis=1) == golds).mean() > 0.98
    assert softmax(alone).max(axis=1).mean() > 0.9  # of weight enough to be sure


def test_what_is_served_is_as_sure_as_what_is_said_of_rows(telling):
    """A probe's scores and those of the front end together, on rows that nothing was fitted to."""
    golds = GOLDS[::-1]
    states = states_for(golds, seed=9).astype(np.float32)
    vectors, vote = unit_vectors(N, seed=9), np.log([0.5, 0.5])
    for place, layer in enumerate(telling.layers):
        front = [telling.front_scores(layer, vector, vote) for vector in vectors]
        served = softmax(telling.probes[place].scores(states[:, place]) + np.array(front))
        told = telling.exit_probs[:, place].mean()
        assert served[np.arange(N), golds].mean() == pytest.approx(told, abs=0.03)


def test_alone_the_last_probe_is_louder_or_softer(telling):
    last = telling.probes[-1]
    ratio = telling.alone.weight / last.weight
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3)
    np.testing.assert_allclose(telling.alone.bias, last.bias * ratio.mean(), rtol=1e-3)


def test_the_encoder_is_heard_where_states_say_nothing():
    telling_vectors = unit_vectors(N)
    telling_vectors[:, 0] += 4 * (2 * GOLDS - 1)
    telling_vectors /= np.linalg.norm(telling_vectors, axis=1, keepdims=True)
    found = fitted(states_for(GOLDS, layer=2), vectors=telling_vectors)
    assert found.is_right[:, 0].mean() > 0.98  # the states of layer 1 are noise
    assert found.encoder_weights[1] > 0 or found.vote_weights[1] > 0
    assert found.certainties.mean() > 0.9
    for vector, gold in zip(telling_vectors[:20], GOLDS, strict=False):
        assert found.front_scores(None, vector, np.zeros(2)).argmax() == gold


def test_front_scores_are_the_weighted_voices():
    encoder = Probe(np.array([[1, 0], [0, 2]], np.float32), np.array([0.5, 0], np.float32))
    weights = {
        "encoder_weights": np.array([1, 2, 0], np.float32),
        "vote_weights": np.array([0.5, 0, 3], np.float32),
    }
    own = made_fit(row_ids(3), np.ones((3, 2)), layers=(2, 4), encoder=encoder, **weights)
    vector, vote = np.array([0.6, 0.8], np.float16), np.log([0.2, 0.8])
    said = np.array([1.1, 1.6])
    np.testing.assert_allclose(own.front_scores(None, vector, vote), said + vote / 2, rtol=1e-3)
    np.testing.assert_allclose(own.front_scores(2, vector, vote), 2 * said, rtol=1e-3)
    np.testing.assert_allclose(own.front_scores(4, vector, vote), 3 * vote, rtol=1e-3)
    expected = softmax(said + vote / 2).max()
    assert own.certainty(vector, vote) == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="not in tuple"):
        own.front_scores(3, vector, vote)


def test_the_order_of_rows_means_nothing(telling):
    order = np.random.default_rng(5).permutation(N)
    ids, states = [IDS[i] for i in order], states_for(GOLDS)[order]
    mixed = fitted(states, GOLDS[order], unit_vectors(N)[order], ids)
    np.testing.assert_allclose(mixed.exit_probs, telling.exit_probs[order], atol=1e-3)
    np.testing.assert_allclose(mixed.certainties, telling.certainties[order], atol=1e-3)


def test_the_same_rows_give_the_same_bytes_and_others_do_not(telling):
    again, other = fitted(states_for(GOLDS)), fitted(states_for(GOLDS, seed=1))
    assert again.to_bytes() == telling.to_bytes() and again.digest == telling.digest
    assert other.digest != telling.digest and len(telling.digest) == 12


def test_each_layer_is_told_when_it_is_done():
    told = []
    fitted(states_for(GOLDS), done=told.append)
    assert told == list(LAYERS)


def test_votes_are_of_the_nearest_others():
    vectors, counts = unit_vectors(N), np.bincount(GOLDS)
    found = fit_module._votes(vectors, GOLDS, 2)
    similarities = vectors @ vectors.T
    for row in (0, 77, N - 1):
        others = np.delete(np.arange(N), row)
        near = others[np.argsort(-similarities[row, others])[: neighbours.VOTERS]]
        expected = log_votes(similarities[row, near], GOLDS[near], counts)
        np.testing.assert_allclose(found[row], expected, rtol=1e-4)


def test_in_a_large_task_a_sample_votes(monkeypatch):
    """Rows that are drawn have no vote on themselves, and the others are no voters."""
    monkeypatch.setattr(fit_module, "ALL_VOTE", N - 1)
    monkeypatch.setattr(fit_module, "SAMPLED_VOTERS", 50)
    monkeypatch.setattr(neighbours, "VOTERS", 49)
    vectors = unit_vectors(N)
    drawn = np.sort(np.random.default_rng(0).choice(N, 50, False))
    found = fit_module._votes(vectors, GOLDS, 2)
    counts = np.bincount(GOLDS[drawn], minlength=2)
    outsider = np.setdiff1d(np.arange(N), drawn)[0]
    for row in (drawn[7], outsider):
        others = drawn[drawn != row]
        similarities = vectors[row] @ vectors[others].T
        near = np.argsort(-similarities)[:49]
        expected = log_votes(similarities[near], GOLDS[others[near]], counts)
        np.testing.assert_allclose(found[row], expected, rtol=1e-4)


def test_a_label_of_one_row_and_labels_of_none():
    golds = GOLDS.copy()
    golds[7] = 2
    assert why_not(golds, IDS) is None
    found = fitted(states_for(GOLDS), golds, num_labels=150)
    assert found.num_labels == 150 and np.isfinite(found.exit_probs).all()
    assert found.exit_probs[7].max() < 0.5  # nobody has seen its label but itself
    assert found.is_right[np.arange(N) != 7, 1:].mean() > 0.95
    states = states_for(GOLDS)[:, -1].astype(np.float32)
    assert set(found.alone.scores(states).argmax(axis=1)) <= {0, 1, 2}


def test_too_few_rows_are_refused():
    assert why_not(GOLDS[:FEWEST_ROWS], IDS[:FEWEST_ROWS]) is None
    few = FEWEST_ROWS - 1
    assert why_not(GOLDS[:few], IDS[:few]) == "it has 39 rows, and probes need at least 40"
    assert "0 rows" in why_not(GOLDS[:0], [])


def test_one_label_is_refused_and_so_is_one_with_a_single_row_of_another():
    alike = np.zeros(N, np.int32)
    assert why_not(alike, IDS).startswith("its rows have only one label")
    alike[3] = 1
    assert why_not(alike, IDS).startswith("its rows have only one label")
    other = next(i for i in range(4, N) if fold_of(IDS[i]) != fold_of(IDS[3]))
    alike[other] = 1
    assert why_not(alike, IDS) is None
    assert np.isfinite(fitted(states_for(GOLDS), alike).exit_probs).all()


def test_ids_that_all_fall_into_one_fold_are_refused():
    """Without them nothing is left to fit to."""
    ids = [row_id for row_id in row_ids(50 * FOLDS) if fold_of(row_id) == 0][:FEWEST_ROWS]
    assert len(ids) == FEWEST_ROWS and why_not(GOLDS[:FEWEST_ROWS], ids) is not None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_states_and_vectors_that_are_not_finite_are_refused(value):
    states, vectors = states_for(GOLDS), unit_vectors(N)
    states[3, 2, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        fitted(states)
    vectors[5, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        fitted(states_for(GOLDS), vectors=vectors)


def test_a_fit_comes_back_as_it_was(telling):
    found = TaskFit.from_bytes(telling.to_bytes())
    for own in dataclasses.fields(TaskFit):
        before, after = getattr(telling, own.name), getattr(found, own.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(after, before)
    assert (found.layers, found.ids, found.digest) == (telling.layers, telling.ids, telling.digest)
    for before, after in zip(
        (*telling.probes, telling.alone, telling.encoder),
        (*found.probes, found.alone, found.encoder),
        strict=True,
    ):
        np.testing.assert_array_equal(after.weight, before.weight)
        np.testing.assert_array_equal(after.bias, before.bias)


SMALL = made_fit(row_ids(3), np.ones((3, 2)), layers=(2, 4), dimension=4).to_bytes()


@given(st.integers(0, len(SMALL) - 1))
def test_bytes_cut_short_are_named(length):
    with pytest.raises(TableError, match="a fit cannot be read"):
        TaskFit.from_bytes(SMALL[:length])


@given(st.integers(0, int.from_bytes(SMALL[:8], "little") + 7), st.integers(1, 255))
def test_a_damaged_head_is_named_or_read(place, change):
    """Whatever byte of it is changed, nothing but TableError is raised."""
    damaged = bytearray(SMALL)
    damaged[place] ^= change
    with contextlib.suppress(TableError):
        TaskFit.from_bytes(bytes(damaged))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a fit",
        packed({"a/1": SMALL and Probe(np.ones((2, 3), np.float32), np.ones(2, np.float32))}),
    ],
)
def test_other_bytes_are_named(data):
    with pytest.raises(TableError, match="a fit cannot be read"):
        TaskFit.from_bytes(data)


def test_probes_go_by_task_and_layer(telling):
    named = telling.named_probes("sst2")
    assert list(named) == ["sst2/1", "sst2/2", "sst2/3", "sst2/4", f"sst2/{ALONE}"]
    assert named["sst2/3"] is telling.probes[2] and named["sst2/alone"] is telling.alone


def test_the_probe_set_is_all_tasks_and_known_by_its_content(telling):
    assert probe_set({}) is None
    name, data = probe_set({"sst2": telling, "mr": telling})
    found = unpacked(data)
    assert set(found) == {*telling.named_probes("sst2"), *telling.named_probes("mr")}
    np.testing.assert_array_equal(found["mr/2"].weight, telling.probes[1].weight)
    assert probe_set({"sst2": telling, "mr": telling})[0] == name
    other = fitted(states_for(GOLDS, seed=1))
    names = {name, probe_set({"sst2": telling})[0], probe_set({"sst2": telling, "mr": other})[0]}
    assert len(names) == 3


@pytest.mark.parametrize("data", [b"", b"x" * 40, packed({})[:-1]])
def test_probes_that_cannot_be_read_are_named(data):
    with pytest.raises(TableError, match="probes cannot be read"):
        unpacked(data)
