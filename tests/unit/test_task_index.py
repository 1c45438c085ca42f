"""What is read of a task when its table is opened."""

import dataclasses

import numpy as np
import pytest

from raee_serve.errors import TableError
from raee_serve.exits.choice import Choice
from raee_serve.retrieval import task_index
from raee_serve.retrieval.task_index import (
    BOUND_QUANTILE,
    FAR_NEIGHBOURS,
    MIN_BOUND,
    far_neighbours,
    load_task,
)
from raee_serve.table.schema import Built, TaskEntry, TaskRows
from raee_serve.table.store import ExitTable
from raee_serve.tasks.registry import get_task
from tests.unit.table_rows import (
    add_all,
    entry,
    fitting_rows,
    label_rows,
    made_fit,
    metadata,
    put_fit,
    row_ids,
    unit_vectors,
)

pytestmark = pytest.mark.unit

N = 60


@pytest.fixture
def table(uri):
    return ExitTable.open_or_create(uri, metadata())


def loaded(table, name="sst2", **options):
    options = {"keep_vectors": True, "max_distance": None, "budget": None, **options}
    return load_task(table, name, **options)


def test_exit_information_is_what_the_fit_says_of_each_row(table):
    """In the table's order, which is not the fit's; layers without a probe have none."""
    ids = row_ids(5)
    probs = np.linspace(0.1, 1, 10).reshape(5, 2)
    sure = np.linspace(0.5, 0.9, 5).astype(np.float32)
    fit = made_fit(ids[::-1], probs, layers=(2, 4), certainties=sure, dimension=8)
    put_fit(table, "sst2", label_rows(ids), fit)
    index = loaded(table)
    order = [fit.ids.index(own) for own in index.ids]
    np.testing.assert_allclose(index.evidence[:, 0, [1, 3]], probs[order], rtol=1e-6)
    assert not index.evidence[:, 0, [0, 2]].any()
    np.testing.assert_array_equal(index.certainties, sure[order])
    assert index.heads == ("probe",) and index.fit.digest == fit.digest
    assert index.most_kept == np.inf and index.choice == Choice.default("labels")


def test_rows_after_the_last_fit_have_none(table):
    add_all(table, "sst2", fitting_rows(N))
    table.add("sst2", fitting_rows(5, seed="late"))
    index = loaded(table)
    late = np.isin(index.ids, row_ids(5, "late"))
    assert late.sum() == 5 and len(index) == N + 5
    assert not index.evidence[late].any() and not index.certainties[late].any()
    assert (index.evidence[~late] > 0).all() and (index.certainties[~late] >= 0.5).all()
    assert index.counts.sum() == N + 5  # they vote all the same


def test_rows_that_were_deleted_are_no_matter(table):
    rows = fitting_rows(N)
    add_all(table, "sst2", rows)
    table.delete_rows(rows.ids[:7])
    index = loaded(table)
    fit = table.fit("sst2")
    kept = [fit.ids.index(own) for own in index.ids]
    assert len(index) == N - 7 and len(fit.ids) == N
    np.testing.assert_array_equal(index.evidence[:, 0], fit.exit_probs[kept])


def test_without_a_fit_the_plain_head_is_all(table):
    add_all(table, "sst2", label_rows(row_ids(6), golds=[0, 0, 0, 0, 1, 1]))
    index = loaded(table)
    assert (index.heads, index.fit) == (("plain",), None)
    assert not index.evidence.any() and index.plain_probs.shape == (6, 4)
    assert index.counts.tolist() == [4, 2]


def test_labels_without_rows_are_counted(table):
    add_all(table, "trec", trec_rows(4))
    assert loaded(table, "trec").counts.tolist() == [2, 2, 0, 0, 0, 0]


def trec_rows(n):
    own = label_rows(row_ids(n))
    return dataclasses.replace(own, full_logprobs=np.full((n, 6), -1.0, np.float32))


def test_free_text_is_drawn_towards_what_the_task_does(table):
    own = TaskEntry.of(get_task("xsum"), (), (2, 3, 4))
    table.put_task(own)
    hits = np.random.default_rng(0).uniform(0.2, 0.6, (N, 3)).astype(np.float32)
    hits[:, 2] = 0.6
    rows = TaskRows(row_ids(N), unit_vectors(N), agreement=hits, reference_hits=hits)
    table.add("xsum", rows)
    table.finish("xsum", Built(N, "it is free text"), None)
    index = loaded(table, "xsum")
    assert index.heads == ("plain", "shortcut") and index.fit is None
    assert index.most_kept == pytest.approx(hits[:, :2].max() / 0.6, rel=1e-5)
    spread = index.evidence[:, 0, 1].std() / hits[:, 0].std()
    assert spread < 0.5  # rows were drawn at random: their neighbours know nothing of them
    np.testing.assert_allclose(index.evidence[:, 0, 3], 0.6, rtol=1e-5)
    np.testing.assert_allclose(index.evidence[:, 0, 1].mean(), hits[:, 0].mean(), rtol=1e-4)
    assert index.choice == Choice.default("free-text")


def test_the_choice_is_the_stored_one_and_the_budget_the_servers(table):
    add_all(table, "sst2", fitting_rows(N))
    table.put_choices({"sst2": Choice(5, 0.8)})
    assert loaded(table).choice == Choice(5, 0.8)
    assert loaded(table, budget=0.7).choice == Choice(5, 0.7)


def test_the_bound_is_how_far_rows_are_from_their_others(table):
    add_all(table, "sst2", fitting_rows(N))
    index = loaded(table)
    similarities = index.vectors @ index.vectors.T
    np.fill_diagonal(similarities, -np.inf)
    nearest = -np.sort(-similarities, axis=1)[:, :FAR_NEIGHBOURS]
    expected = np.quantile(1 - nearest.mean(axis=1), BOUND_QUANTILE)
    assert index.distance_bound == pytest.approx(expected, abs=1e-6)
    assert loaded(table, max_distance=0.3).distance_bound == 0.3


def test_a_lone_row_has_the_least_bound(table):
    add_all(table, "sst2", label_rows(row_ids(1)))
    assert loaded(table).distance_bound == MIN_BOUND
    assert [far_neighbours(n) for n in (1, 2, 13, 99)] == [1, 1, 12, 12]


def test_a_task_is_loaded_alike_with_and_without_vectors_however_it_is_cut(table, monkeypatch):
    add_all(table, "sst2", fitting_rows(N))
    whole = loaded(table)
    monkeypatch.setattr(task_index, "AT_ONCE", 7)
    cut = loaded(table, keep_vectors=False)
    assert cut.vectors is None and len(cut.keys) == N and len(whole.keys) == 0
    assert cut.ids == whole.ids
    np.testing.assert_array_equal(cut.evidence, whole.evidence)
    np.testing.assert_array_equal(cut.labels, whole.labels)
    assert cut.distance_bound == pytest.approx(whole.distance_bound, abs=1e-6)


def test_of_a_large_task_a_sample_stands_for_all(table, monkeypatch):
    add_all(table, "sst2", fitting_rows(N))
    whole = loaded(table)
    monkeypatch.setattr(task_index, "ALL_DRAWN", N - 1)
    monkeypatch.setattr(task_index, "DRAWN", 40)
    monkeypatch.setattr(task_index, "AT_ONCE", 33)
    sampled = loaded(table, keep_vectors=False)
    np.testing.assert_array_equal(sampled.evidence, whole.evidence)
    assert sampled.distance_bound == pytest.approx(whole.distance_bound, rel=0.2)


def test_a_fit_of_other_bytes_is_named(table, monkeypatch):
    monkeypatch.setattr("raee_serve.exits.fit.TaskFit.to_bytes", lambda _: b"?")
    put_fit(table, "sst2", label_rows(row_ids(2)), made_fit(row_ids(2), np.ones((2, 4))))
    with pytest.raises(TableError, match=r"fit of task sst2"):
        loaded(table)
    assert table.entry("sst2") == entry("sst2")
