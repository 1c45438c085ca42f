"""Rows held in memory and rows behind LanceDB's index give the same decisions."""

import dataclasses

import numpy as np
import pytest

from raee_serve.cli import main
from raee_serve.errors import TableError
from raee_serve.records import Reason
from raee_serve.retrieval.heads import LeaveOneOutVotes
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.retrieval.search import InMemorySearch, largest
from raee_serve.retrieval.task_index import AT_ONCE, MIN_BOUND, load_task
from raee_serve.table.check_command import measure_recall
from raee_serve.table.index import KINDS, kind_for
from raee_serve.table.store import ExitTable
from tests.unit.table_rows import BACKBONE, entry, label_rows, metadata, unit_vectors

pytestmark = pytest.mark.unit

ADJECTIVES = ("wonderful", "dull", "moving", "noisy", "brief", "strange", "warm", "tired")
THINGS = ("film", "book", "hotel", "phone", "song", "meal", "play", "match", "lecture", "journey")
TEXTS = [f"a {adjective} {thing}" for adjective in ADJECTIVES for thing in THINGS]
PROMPTS = [f"a {adjective} and long {thing}" for adjective in ADJECTIVES for thing in THINGS[:3]]


@pytest.fixture(scope="module")
def uri(encoder, tmp_path_factory):
    """Three tasks of 80 texts each, their exits and labels drawn at random."""
    uri = str(tmp_path_factory.mktemp("tables") / "indexed")
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    for seed, (name, end) in enumerate({"sst2": "", "mr": " by day", "cr": " by night"}.items()):
        vectors = encoder.encode([text + end for text in TEXTS])
        rng = np.random.default_rng(seed)
        right, golds = rng.random((len(TEXTS), 4)), rng.integers(0, 2, len(TEXTS))
        table.put_task(entry(name))
        ids = [f"{name}:{text}" for text in TEXTS]
        table.add(name, label_rows(ids, vectors, right, golds))
    return uri


@pytest.fixture(scope="module")
def indexed_uri(uri):
    assert main(["table", "index", uri, "--kind", "IVF_HNSW_SQ"]) == 0
    return uri


def decisions(retriever):
    """Of all prompts together, for one and for two tasks and for every rule."""
    lookups = [
        Lookup(candidates, prompt, rule=rule)
        for candidates in (("sst2",), ("cr", "mr"))
        for rule in ("published", "calibrated", "fused", "stacked")
        for prompt in (*PROMPTS, "quantum chromodynamics on a lattice")
    ]
    return [dataclasses.replace(d, lookup_ms=0) for d in retriever.decide(lookups)]


def test_the_index_decides_as_memory_does(indexed_uri):
    memory = ExitRetriever.open(indexed_uri, backbone=BACKBONE, rows_in_memory_mb=1)
    index = ExitRetriever.open(indexed_uri, backbone=BACKBONE, rows_in_memory_mb=0)
    assert (memory.searches_index, index.searches_index) == (False, True)
    assert memory.num_rows == index.num_rows == 3 * len(TEXTS)
    pairs = list(zip(decisions(memory), decisions(index), strict=True))
    assert {a.reason for a, _ in pairs} == {Reason.RETRIEVED, Reason.FAR}
    for exact, found in pairs:
        assert found.distance == pytest.approx(exact.distance, abs=1e-5)
        assert found.label_bias == pytest.approx(exact.label_bias, abs=1e-4)
        assert (found.exit_layer, found.reason, found.task) == (
            exact.exit_layer,
            exact.reason,
            exact.task,
        )


def test_rows_added_after_the_index_are_found(encoder, tmp_path):
    uri = str(tmp_path / "grown")
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    table.put_task(entry("sst2"))
    table.add("sst2", label_rows(TEXTS[:40], encoder.encode(TEXTS[:40])))
    table.build_index("IVF_FLAT")
    table.add("sst2", label_rows(TEXTS[40:], encoder.encode(TEXTS[40:])))
    assert table.index.unindexed_rows == 40 + 1  # and the record of the change
    retriever = ExitRetriever.open(uri, backbone=BACKBONE, rows_in_memory_mb=0)
    (decision,) = retriever.decide([Lookup(("sst2",), TEXTS[70])])
    assert decision.distance < MIN_BOUND


def test_a_table_beyond_the_budget_needs_an_index(encoder, tmp_path):
    uri = str(tmp_path / "plain")
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    table.put_task(entry("sst2"))
    table.add("sst2", label_rows(["a"], encoder.encode(["a"])))
    with pytest.raises(TableError, match=rf"--rows-in-memory 0, .*raee-serve table index {uri}"):
        ExitRetriever.open(uri, backbone=BACKBONE, rows_in_memory_mb=0)
    assert not ExitRetriever.open(uri, backbone=BACKBONE).searches_index


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_index_can_be_built_and_asked(kind, tmp_path):
    table = ExitTable.open_or_create(str(tmp_path / "kinds"), metadata())
    for name in ("sst2", "cr"):
        table.put_task(entry(name))
        ids = [f"{name}{i}" for i in range(300)]
        table.add(name, label_rows(ids, unit_vectors(300, seed=len(name))))
    table.build_index(kind)
    reopened = ExitTable.open(table.uri)
    assert reopened.index.kind == kind and reopened.index.unindexed_rows == 0
    assert measure_recall(reopened, "cr", 5, 50) > 0.9
    keys = set(reopened.keys("cr").tolist())
    for found, distances in reopened.index.nearest(["cr"], unit_vectors(3, seed=9), 7):
        assert len(found) == 7 and set(found.tolist()) <= keys
        assert (np.diff(distances) >= 0).all()


def test_larger_tables_get_smaller_indexes():
    assert [kind_for(n) for n in (1, 10**6, 10**8)] == ["IVF_FLAT", "IVF_HNSW_SQ", "IVF_PQ"]


def test_largest_come_first_and_earlier_ones_of_equals():
    assert largest(np.array([1, 5, 3, 4], np.float32), 3).tolist() == [1, 3, 2]
    assert largest(np.array([2, 1], np.float32), 9).tolist() == [0, 1]


def test_rows_of_several_tasks_are_numbered_task_by_task():
    own = {"a": unit_vectors(5, seed=1), "b": unit_vectors(4, seed=2)}
    search = InMemorySearch(own)
    (found,) = search.nearest(["b"], own["b"][2:3], 9)
    assert found.rows[0] == 7 and sorted(found.rows) == [5, 6, 7, 8]
    (found,) = search.nearest(["b", "a"], own["a"][3:4], 1)
    assert found.rows.tolist() == [3] and found.distances[0] == pytest.approx(0, abs=1e-6)


def test_a_task_is_loaded_alike_with_and_without_vectors_however_it_is_cut(uri, monkeypatch):
    table = ExitTable.open(uri)
    options = {"max_distance": None, "fraction": None, "vote_weight": None, "quality": None}
    whole = load_task(table, "mr", keep_vectors=True, **options)
    monkeypatch.setattr("raee_serve.retrieval.task_index.AT_ONCE", 7)
    cut = load_task(table, "mr", keep_vectors=False, **options)
    assert len(TEXTS) < AT_ONCE and cut.vectors is None and len(cut.keys) == len(TEXTS)
    np.testing.assert_allclose(cut.evidence, whole.evidence, atol=1e-6)
    np.testing.assert_array_equal(cut.labels, whole.labels)
    assert cut.distance_bound == pytest.approx(whole.distance_bound, abs=1e-6)


def test_in_a_large_task_a_sample_votes(uri, monkeypatch):
    table = ExitTable.open(uri)
    options = {"max_distance": None, "fraction": None, "vote_weight": None, "quality": None}
    whole = load_task(table, "cr", keep_vectors=True, **options)
    monkeypatch.setattr("raee_serve.retrieval.task_index.ALL_VOTE", 70)
    monkeypatch.setattr("raee_serve.retrieval.task_index.VOTERS", 60)
    monkeypatch.setattr("raee_serve.retrieval.task_index.AT_ONCE", 33)
    sampled = load_task(table, "cr", keep_vectors=False, **options)
    np.testing.assert_array_equal(sampled.evidence[:, 0], whole.evidence[:, 0])
    assert not np.allclose(sampled.evidence[:, 2:], whole.evidence[:, 2:])
    assert ((sampled.evidence > 0) == (whole.evidence > 0)).mean() > 0.8


def test_a_row_of_a_part_has_no_vote_on_itself():
    vectors, labels = unit_vectors(40), np.arange(40, dtype=np.int32) % 2
    everyone = LeaveOneOutVotes(vectors, labels, 2, 5)
    part = LeaveOneOutVotes(vectors, labels, 2, 5, on=(vectors[7:20], np.arange(7, 20)))
    np.testing.assert_array_equal(part.nearest, everyone.nearest[7:20])
    np.testing.assert_allclose(part.log_votes(3), everyone.log_votes(3)[7:20], rtol=1e-5)
    stranger = LeaveOneOutVotes(vectors, labels, 2, 5, on=(vectors[7:8], np.array([-1])))
    assert stranger.nearest[0, 0] == 7
