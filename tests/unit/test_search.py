"""Rows held in memory and rows behind LanceDB's index give the same decisions."""

import dataclasses

import numpy as np
import pytest

from raee_serve.cli import main
from raee_serve.errors import TableError
from raee_serve.records import Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.retrieval.search import InMemorySearch, largest
from raee_serve.retrieval.task_index import MIN_BOUND
from raee_serve.table.check_command import measure_recall
from raee_serve.table.index import KINDS, kind_for
from raee_serve.table.store import ExitTable
from tests.unit.table_rows import (
    BACKBONE,
    add_all,
    entry,
    label_rows,
    metadata,
    row_ids,
    states_for,
    unit_vectors,
)

pytestmark = pytest.mark.unit

ADJECTIVES = ("wonderful", "dull", "moving", "noisy", "brief", "strange", "warm", "tired")
THINGS = ("film", "book", "hotel", "phone", "song", "meal", "play", "match", "lecture", "journey")
TEXTS = [f"a {adjective} {thing}" for adjective in ADJECTIVES for thing in THINGS]
PROMPTS = [f"a {adjective} and long {thing}" for adjective in ADJECTIVES for thing in THINGS[:3]]


@pytest.fixture(scope="module")
def uri(encoder, tmp_path_factory):
    """Three tasks of 80 texts each, with probes; their states and labels drawn at random."""
    uri = str(tmp_path_factory.mktemp("tables") / "indexed")
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    for seed, (name, end) in enumerate({"sst2": "", "mr": " by day", "cr": " by night"}.items()):
        vectors = encoder.encode([text + end for text in TEXTS])
        rng = np.random.default_rng(seed)
        right, golds = rng.random((len(TEXTS), 4)), rng.integers(0, 2, len(TEXTS))
        ids = row_ids(len(TEXTS), name)
        states = states_for(golds, 3, seed)
        add_all(table, name, label_rows(ids, vectors, right, golds, states))
    return uri


@pytest.fixture(scope="module")
def indexed_uri(uri):
    assert main(["table", "index", uri, "--kind", "IVF_HNSW_SQ"]) == 0
    return uri


def decisions(retriever):
    """Of all prompts together, for one and for two tasks, by probes and by the paper's rule."""
    lookups = [
        Lookup(candidates, prompt, head=head)
        for candidates in (("sst2",), ("cr", "mr"))
        for head in (None, "plain")
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
    assert {a.head for a, _ in pairs} == {"probe", "plain"} and len({a.probe for a, _ in pairs}) > 3
    for exact, found in pairs:
        assert found.distance == pytest.approx(exact.distance, abs=1e-5)
        assert found.label_scores == pytest.approx(exact.label_scores, abs=1e-4)
        assert (found.exit_layer, found.reason, found.probe) == (
            exact.exit_layer,
            exact.reason,
            exact.probe,
        )


def test_rows_added_after_the_index_are_found(encoder, tmp_path):
    uri = str(tmp_path / "grown")
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    add_all(table, "sst2", label_rows(TEXTS[:30], encoder.encode(TEXTS[:30])))
    table.build_index("IVF_FLAT")
    table.add("sst2", label_rows(TEXTS[30:], encoder.encode(TEXTS[30:])))
    assert table.index.unindexed_rows == 50 + 1  # and the record of the change
    retriever = ExitRetriever.open(uri, backbone=BACKBONE, rows_in_memory_mb=0)
    (decision,) = retriever.decide([Lookup(("sst2",), TEXTS[70])])
    assert decision.distance < MIN_BOUND


def test_a_table_beyond_the_budget_needs_an_index(encoder, tmp_path):
    uri = str(tmp_path / "plain")
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    add_all(table, "sst2", label_rows(["a"], encoder.encode(["a"])))
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
