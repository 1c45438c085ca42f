"""Encoders cut to their first layers, and tables moved to other encoders."""

import re

import numpy as np
import pytest

from raee_serve.cli import main
from raee_serve.errors import CheckpointError, RaeeError, TaskError
from raee_serve.exits.choice import Choice
from raee_serve.retrieval.cut_encoder import FEWEST_TEXTS, cut_encoder
from raee_serve.retrieval.encoder import Encoder
from raee_serve.shortcuts import FILE_NAME
from raee_serve.table.build import complete
from raee_serve.table.schema import TableMetadata, TaskEntry, row_id
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import load_examples
from raee_serve.tasks.registry import get_task
from tests.unit.table_rows import BACKBONE, LAYERS, label_rows, states_for

pytestmark = pytest.mark.unit

TASK = get_task("demo_sentiment")
ROWS = 60


@pytest.fixture(scope="module")
def examples():
    return load_examples(TASK, "train")


@pytest.fixture(scope="module")
def cut(minilm, examples, tmp_path_factory):
    """Its directory, made by the command a user would type."""
    target = tmp_path_factory.mktemp("encoders") / "short"
    command = ["encoder", "cut", "--layers", "2", "--task", TASK.name, "--out", str(target)]
    assert main(command) == 0
    return target


@pytest.mark.parametrize("backend", ["torch", "onnx-int8"])
def test_what_is_left_stands_for_the_whole(cut, examples, backend):
    """Closer to the whole encoder's vectors than those of other texts are."""
    texts = [example.text for example in examples[:40]]
    whole, short = Encoder("minilm").encode(texts), Encoder(str(cut), backend=backend).encode(texts)
    similarity = short @ whole.T
    own = similarity.diagonal()
    others = similarity[~np.eye(len(texts), dtype=bool)]
    assert own.mean() > 0.6 > others.mean() + 0.3
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5)


def test_it_has_fewer_layers_and_says_so(cut, minilm, examples, tmp_path):
    texts = [example.text for example in examples]
    report = cut_encoder("minilm", 5, texts, tmp_path / "five")
    assert (report.layers, report.num_layers) == (5, 6)
    assert report.fitted + report.held_out == len(texts)
    assert 0.5 < report.similarity < 1
    assert len(Encoder(str(tmp_path / "five"))._model[0].model.encoder.layer) == 5
    assert len(Encoder(str(cut))._model[0].model.encoder.layer) == 2


@pytest.mark.parametrize("layers", [0, 6, -1])
def test_other_numbers_of_layers(minilm, tmp_path, layers):
    with pytest.raises(RaeeError, match=rf"--layers is {layers}; .* 6 layers: 1\.\.5"):
        cut_encoder("minilm", layers, ["a text"] * FEWEST_TEXTS, tmp_path / "short")


def test_what_cannot_be_cut(minilm, cut, tmp_path):
    with pytest.raises(TaskError, match=f"99 texts .* at least {FEWEST_TEXTS}"):
        cut_encoder("minilm", 3, ["a text"] * 99, tmp_path / "short")
    with pytest.raises(CheckpointError, match="cannot load encoder"):
        cut_encoder(str(tmp_path), 3, ["a text"] * FEWEST_TEXTS, tmp_path / "short")


@pytest.fixture
def table(minilm, examples, tmp_path):
    """Of texts that it does not keep, with a file in the place of its shortcuts."""
    rows, uri = examples[:ROWS], tmp_path / "table"
    vectors = Encoder("minilm").encode([e.text for e in rows])
    table = ExitTable.open_or_create(
        str(uri), TableMetadata(BACKBONE, Encoder("minilm").identity())
    )
    table.put_task(TaskEntry.of(TASK, (1, 2), LAYERS))
    ids, golds = [row_id(TASK.name, e.text, e.gold) for e in rows], [e.gold for e in rows]
    states = states_for(golds)
    table.add(TASK.name, label_rows(ids, vectors, golds=golds, states=states))
    complete(table, TASK.name, progress=False)
    table.put_choices({TASK.name: Choice(5, 0.9)})
    (uri / FILE_NAME).write_bytes(b"maps")
    return uri


def test_a_table_moves_to_another_encoder(table, cut, examples, tmp_path):
    target = tmp_path / "moved"
    command = ["table", "reencode", str(table), "--encoder", str(cut), "--out", str(target)]
    assert main(command) == 0
    old, new = ExitTable.open(str(table)), ExitTable.open(str(target))
    assert new.metadata.encoder == Encoder(str(cut)).identity()
    assert new.metadata.tasks == old.metadata.tasks
    assert old.metadata.choices and not new.metadata.choices
    before, after = old.rows(TASK.name), new.rows(TASK.name)
    assert after.ids == before.ids
    np.testing.assert_array_equal(after.plain_probs, before.plain_probs)
    by_id = {row_id(TASK.name, e.text, e.gold): e.text for e in examples}
    expected = Encoder(str(cut)).encode([by_id[own] for own in after.ids])
    np.testing.assert_allclose(after.vectors, expected, atol=1e-5)
    was, fit = old.fit(TASK.name), new.fit(TASK.name)
    assert set(fit.ids) == set(after.ids) and fit.digest != was.digest
    assert fit.is_right[:, 1:].mean() > 0.9  # the states moved with the rows
    states = [own.states(TASK.name, after.ids) for own in (old, new)]
    np.testing.assert_array_equal(*states)
    assert (target / FILE_NAME).read_bytes() == b"maps"


def test_what_cannot_be_moved_leaves_no_table(table, cut, tmp_path, capsys):
    there = ["table", "reencode", str(table), "--encoder", str(cut), "--out", str(table)]
    assert main(there) == 1
    assert "exists" in capsys.readouterr().err
    ExitTable.open(str(table)).add(TASK.name, label_rows(["0" * 32], np.eye(1, 384)))
    target = tmp_path / "moved"
    command = ["table", "reencode", str(table), "--encoder", str(cut), "--out", str(target)]
    assert main(command) == 1
    assert re.search(
        f"1 of {ROWS + 1} rows of task demo_sentiment are not in", capsys.readouterr().err
    )
    assert not target.exists()


def test_a_move_that_is_cut_short_leaves_no_table(table, cut, tmp_path, monkeypatch):
    def full(self, texts):
        raise RaeeError("no memory left")

    target = tmp_path / "moved"
    monkeypatch.setattr(Encoder, "encode", full)
    command = ["table", "reencode", str(table), "--encoder", str(cut), "--out", str(target)]
    assert main(command) == 1
    assert not target.exists()
