"""Building over a Ray cluster: the same table as one process builds."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from raee_serve.cli import main
from raee_serve.errors import BindingError, RaeeError
from raee_serve.fingerprint import identify_backbone
from raee_serve.retrieval.encoder import Encoder
from raee_serve.table import ray_build
from raee_serve.table.build import TaskWork
from raee_serve.table.ray_build import EncodeStage, Models, Pools, ProbeStage, ReadBackbone
from raee_serve.table.schema import TableMetadata
from raee_serve.table.store import ExitTable
from tests.tiny import tokenized_llama
from tests.unit.table_rows import entry, label_rows, metadata

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.unit

TASKS = ("sst2", "xsum")
ROWS = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, smollm2):
    return tokenized_llama(tmp_path_factory.mktemp("llama") / "tiny", smollm2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    reviews = [{"text": f"a film of {i} hours", "label": i % 2} for i in range(ROWS)]
    news = [{"document": "News. " * (1 + i), "summary": f"{i} news."} for i in range(ROWS)]
    for name, rows in (("sst2", reviews), ("xsum", news)):
        (root / name).mkdir()
        (root / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def address():
    """A cluster of two nodes on this machine: two CPUs and one, none of them promised to exist."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")  # else last in turn on a busy machine
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def build(checkpoint, data, capsys):
    """Runs the command; what it printed."""

    def build(uri, *more):
        command = ["build", "--model", str(checkpoint), "--table", str(uri), "--data", str(data)]
        tasks = [part for task in TASKS for part in ("--task", task)]
        assert main([*command, *tasks, "--batch-size", "30", "--store-text", *more]) == 0
        return capsys.readouterr().out

    return build


def test_a_cluster_completes_a_table_to_what_one_process_builds(address, build, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    build(alone)
    build(shared, "--limit", "8")
    told = build(shared, "--ray", address, "--ray-workers", "2")
    assert "2 Ray workers probe, up to 1 encode" in told
    for task in TASKS:
        assert f"{task}: {ROWS - 8} rows added, 8 kept" in told
    expected, found = ExitTable.open(str(alone)), ExitTable.open(str(shared))
    assert found.metadata == expected.metadata
    for task in TASKS:
        assert_same_rows(found.rows(task), expected.rows(task))
    own, other = found.fit("sst2"), expected.fit("sst2")
    order = [own.ids.index(id) for id in other.ids]
    np.testing.assert_allclose(own.exit_probs[order], other.exit_probs, atol=0.05)
    assert found.fit("xsum") is None


def assert_same_rows(found, expected):
    assert len(found.ids) == len(set(found.ids)) == ROWS
    order = [found.ids.index(id) for id in expected.ids]
    assert [found.texts[i] for i in order] == expected.texts
    for column in ("vectors", "golds", "plain_probs", "full_logprobs", "reference_hits"):
        values, wanted = getattr(found, column), getattr(expected, column)
        if wanted is None:
            assert values is None
        else:
            np.testing.assert_allclose(values[order], wanted, atol=1e-4)


def test_what_is_done_when_a_build_ends_early_stays_done(tmp_path, monkeypatch):
    table = ExitTable.open_or_create(str(tmp_path / "table"), metadata())
    table.put_task(entry("sst2"))

    def two_groups(*_args):
        yield "sst2", label_rows(["a", "b"])
        yield "sst2", label_rows(["c"])
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_build, "_finished", two_groups)
    work = [TaskWork(entry("sst2"), [], frozenset("abc"), 0, None)]
    with pytest.raises(KeyboardInterrupt):
        ray_build.build_over_cluster(table, work, None, None, progress=False)
    assert ExitTable.open(table.uri).row_ids("sst2") == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("resources", "workers", "expected"),
    [
        ({"CPU": 2}, None, Pools(1, 1, False)),
        ({"CPU": 16}, None, Pools(4, 12, False)),
        ({"CPU": 16}, 2, Pools(14, 2, False)),
        ({"CPU": 64, "GPU": 4}, None, Pools(60, 4, True)),
        ({"CPU": 4, "GPU": 8}, None, Pools(1, 3, True)),
        ({"CPU": 64, "GPU": 4}, 6, Pools(58, 6, False)),
    ],
)
def test_workers_follow_the_cluster(resources, workers, expected):
    assert Pools.of(resources, workers) == expected


@pytest.mark.parametrize(("resources", "workers"), [({"CPU": 1}, None), ({"CPU": 4}, 4), ({}, 1)])
def test_a_cluster_too_small_is_named(resources, workers):
    with pytest.raises(RaeeError, match=r"has \d CPUs; \d to probe and one to encode"):
        Pools.of(resources, workers)


def test_a_worker_with_other_models_is_refused(checkpoint):
    encoder = Encoder("minilm").identity()
    backbone = identify_backbone(checkpoint)
    other = TableMetadata(replace(backbone, weights="ef" * 32), replace(encoder, weights="ef" * 32))
    models = Models(str(checkpoint), "minilm", None, other)
    with pytest.raises(BindingError, match=rf"efefef.*{encoder.weights[:12]}"):
        EncodeStage(models)
    with pytest.raises(BindingError, match=rf"efefef.*{backbone.weights[:12]}"):
        ProbeStage(models)


def test_tokenising_needs_no_weights(checkpoint):
    read = ReadBackbone(str(checkpoint))
    assert (read.num_layers, read.max_length) == (4, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray-workers", "2"], "goes with --ray"),
        (["--ray", "--ray-workers", "0"], "must be at least 1"),
        (["--ray", "127.0.0.1:1"], "cannot join a Ray cluster at '127.0.0.1:1'"),
        (["--ray", "somewhere"], "expected host:port or ray://host:port"),
    ],
)
def test_what_cannot_be_is_one_line(checkpoint, tmp_path, arguments, message, capsys):
    command = ["build", "--model", str(checkpoint), "--task", "demo_sentiment", "--limit", "2"]
    assert main([*command, "--table", str(tmp_path / "table"), *arguments]) == 1
    assert message in capsys.readouterr().err
