"""Exit tables on disk: what goes in comes out, and what is wrong is named with the table's URI."""

import dataclasses
import json
import re
from pathlib import Path

import lancedb
import numpy as np
import pytest

from raee_serve.errors import BindingError, TableError
from raee_serve.exits.fit import TaskFit
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.table.columns import records_to_arrow
from raee_serve.table.evidence import free_text_quality, plain_evidence
from raee_serve.table.info_command import describe
from raee_serve.table.records import Change, binding_record
from raee_serve.table.schema import (
    Built,
    EncoderIdentity,
    TableMetadata,
    TaskRows,
    row_id,
    row_schema,
)
from raee_serve.table.store import EXITS, ExitTable
from tests.unit.table_rows import (
    BACKBONE,
    ENCODER,
    add_all,
    entry,
    fitting_rows,
    label_rows,
    made_fit,
    metadata,
    row_ids,
    unit_vectors,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def table(uri):
    table = ExitTable.open_or_create(uri, metadata())
    table.put_task(entry("sst2"))
    return table


def test_rows_come_back(uri, table):
    rows = label_rows(["a", "b", "c"])
    table.add("sst2", rows)
    reopened = ExitTable.open(uri)
    assert reopened.metadata == table.metadata
    assert reopened.metadata.tasks == {"sst2": entry("sst2")}
    assert reopened.count_rows() == 3 and reopened.row_ids("sst2") == {"a", "b", "c"}
    found = reopened.rows("sst2")
    assert found.ids == rows.ids and found.texts == [None] * 3
    assert found.states is None  # they lie elsewhere, see `test_states`
    for name in ("vectors", "golds", "plain_probs", "full_logprobs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))


def test_free_text_rows_and_texts_come_back(table):
    table.put_task(entry("xsum"))
    hits = np.array([[0.25, 1.0], [0.5, 0.75]], np.float32)
    agreement = np.array([[0.5, 1], [0.75, 1]], np.float32)
    rows = TaskRows(
        ["x", "y"],
        unit_vectors(2),
        agreement=agreement,
        reference_hits=hits,
        texts=["one", "two"],
    )
    table.add("sst2", label_rows(["a"]))
    table.add("xsum", rows)
    found = table.rows("xsum")
    assert found.texts == ["one", "two"] and found.golds is None and found.plain_probs is None
    np.testing.assert_array_equal(found.agreement, agreement)
    quality = free_text_quality(found, entry("xsum"), 4)
    np.testing.assert_array_equal(quality[:, 0], [[0, 0.25, 0, 1], [0, 0.5, 0, 0.75]])
    assert not quality[:, 1].any()


def test_rows_whose_labels_the_plain_head_cannot_tell_apart_say_nothing_of_it(uri, table):
    own = dataclasses.replace(entry("mr"), plain_token_ids=())
    table.put_task(own)
    rows = dataclasses.replace(label_rows(["a", "b"]), plain_probs=None, full_logprobs=None)
    table.add("mr", rows)
    found = ExitTable.open(uri).rows("mr")
    assert found.plain_probs is None and found.full_logprobs is None
    np.testing.assert_array_equal(found.golds, rows.golds)


def test_plain_evidence_is_the_probability_of_gold_where_it_is_the_most_probable():
    p = np.array([[[0.1, 0.9], [0.6, 0.4], [0.4, 0.6]], [[0.5, 0.5], [0.8, 0.2], [0.3, 0.7]]])
    found = plain_evidence(np.log(p), np.array([1, 0], np.int32))
    np.testing.assert_allclose(found, [[0.9, 0, 0.6], [0.5, 0.8, 0]], rtol=1e-6)


def test_a_fit_lies_in_the_version_and_comes_back(uri, table):
    rows = fitting_rows()
    add_all(table, "sst2", rows)
    opened = ExitTable.open(uri)
    fit = opened.fit("sst2")
    assert opened.metadata.built == {"sst2": Built(60)} and set(fit.ids) == set(rows.ids)
    assert fit.to_bytes() == table.fit("sst2").to_bytes()
    assert fit.is_right[:, 1:].mean() > 0.9
    assert opened.count_rows() == 60  # neither record nor states are rows


def test_without_a_fit_the_reason_is_recorded(uri, table):
    finished = add_all(table, "sst2", label_rows(row_ids(5)))
    expected = "it has 5 rows, and probes need at least 40"
    assert finished.no_fit == expected
    opened = ExitTable.open(uri)
    assert opened.metadata.built["sst2"] == Built(5, expected) and opened.fit("sst2") is None
    assert opened.fit("xsum") is None


def test_a_damaged_fit_is_named(uri, table, monkeypatch):
    monkeypatch.setattr(TaskFit, "to_bytes", lambda _: b"no fit")
    table.finish("sst2", Built(3), made_fit(row_ids(3), np.ones((3, 4))))
    with pytest.raises(TableError, match=f"{re.escape(uri)}: fit of task sst2: a fit cannot be"):
        ExitTable.open(uri).fit("sst2")


def test_states_of_rows_are_read_in_their_order(table):
    rows = fitting_rows(8)
    table.add("sst2", rows)
    order = [rows.ids[i] for i in (5, 0, 7)]
    found = table.states("sst2", order)
    np.testing.assert_array_equal(found, rows.states[[5, 0, 7]].transpose(1, 0, 2))
    with pytest.raises(TableError, match="states of task sst2: the states of 1 of 1 rows"):
        table.states("sst2", ["0" * 32])


def test_known_ids_are_left_as_they_are(table):
    table.add("sst2", label_rows(["a", "b"]))
    before = table.rows("sst2").vectors
    table.add("sst2", label_rows(["a", "b", "c"], vectors=unit_vectors(3, seed=1)))
    assert table.count_rows() == 3
    np.testing.assert_array_equal(table.rows("sst2").vectors[:2], before)


def test_compaction_keeps_all_rows(table):
    for n in range(5):
        table.add("sst2", label_rows([f"row{n}"], vectors=unit_vectors(1, seed=n)))
    before = table.rows("sst2")
    table.compact()
    after = table.rows("sst2")
    assert sorted(after.ids) == sorted(before.ids) == [f"row{n}" for n in range(5)]
    assert table.size_bytes() > 0


def test_row_id_is_the_examples_own():
    ids = {row_id("mr", "t", 0), row_id("cr", "t", 0), row_id("mr", "t", 1), row_id("mr", "u", 0)}
    assert len(ids) == 4 and row_id("mr", "t", 0) in ids
    assert re.fullmatch("[0-9a-f]{32}", row_id("mr", "t", 0))


def test_missing_table_is_named_and_not_created(uri):
    with pytest.raises(TableError, match=f"{re.escape(uri)}: no such directory"):
        ExitTable.open(uri)
    assert not Path(uri).exists()


def test_directory_without_a_table(tmp_path):
    with pytest.raises(TableError, match=f"{re.escape(str(tmp_path))}.*named exits in it"):
        ExitTable.open(str(tmp_path))


def test_no_vector_that_is_not_finite_gets_in(uri, table):
    rows = dataclasses.replace(label_rows(["a"]), vectors=np.full((1, 8), np.nan, np.float32))
    with pytest.raises(TableError, match=f"{re.escape(uri)}: cannot change it.*has NaNs"):
        table.add("sst2", rows)


def test_creation_cut_short_is_done_again(uri):
    data = Path(uri) / f"{EXITS}.lance" / "data"
    data.mkdir(parents=True)
    (data / "0.lance").write_bytes(b"the first file, and no version yet")
    with pytest.raises(TableError, match=f"{re.escape(uri)}.*not found"):
        ExitTable.open(uri)
    assert ExitTable.open_or_create(uri, metadata()).count_rows() == 0
    assert ExitTable.open(uri).metadata == metadata()


def test_other_backbone_names_both(uri, table):
    other = TableMetadata(BackboneIdentity("Gemma3ForCausalLM", 18, "ef" * 32), ENCODER)
    with pytest.raises(BindingError, match=r"LlamaForCausalLM \(4 .*Gemma3ForCausalLM \(18"):
        ExitTable.open_or_create(uri, other)


def test_other_encoder_names_both(uri, table):
    other = TableMetadata(BACKBONE, EncoderIdentity("bge", 16, "ef" * 32))
    with pytest.raises(BindingError, match=r"minilm \(8 .*bge \(16"):
        ExitTable.open_or_create(uri, other)


def test_same_encoder_from_another_place_is_the_same(uri, table):
    moved = dataclasses.replace(ENCODER, name="/models/minilm")
    assert ExitTable.open_or_create(uri, TableMetadata(BACKBONE, moved)).count_rows() == 0


def test_task_built_otherwise_names_both_and_what_to_do(table):
    other = dataclasses.replace(entry("sst2"), version="0123456789ab")
    versions = rf"{entry('sst2').version}.*0123456789ab"
    with pytest.raises(BindingError, match=rf"{versions}.*build --replace.*table drop"):
        table.put_task(other)


def broken_binding(uri, json_text):
    rows = records_to_arrow({"binding": json_text}, row_schema(ENCODER.dimension))
    lancedb.connect(uri).create_table(EXITS, data=rows, mode="overwrite")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "metadata cannot be read .*JSONDecodeError"),
        ("[]", "metadata cannot be read"),
        ("{}", "metadata cannot be read .*format"),
        (json.dumps({"format": 99, "metric": "cosine"}), r"\(99, 'cosine'\).*reads 3, cosine"),
        (json.dumps({"format": 2, "metric": "cosine"}), r"\(2, 'cosine'\).*Build the table anew"),
        (json.dumps({"format": 3, "metric": "l2"}), r"\(3, 'l2'\)"),
        (binding_record(metadata()).replace("num_layers", "layers"), "metadata cannot be read"),
    ],
)
def test_corrupt_metadata(uri, table, text, message):
    broken_binding(uri, text)
    with pytest.raises(TableError, match=f"{re.escape(uri)}.*{message}"):
        ExitTable.open(uri)


def test_rows_without_a_binding(uri, table):
    rows = records_to_arrow({}, row_schema(ENCODER.dimension))
    lancedb.connect(uri).create_table(EXITS, data=rows, mode="overwrite")
    with pytest.raises(TableError, match=f"{re.escape(uri)}.*no binding"):
        ExitTable.open(uri)


def test_corrupt_files(uri, table):
    table.add("sst2", label_rows(["a", "b"]))
    for file in Path(uri).glob("exits.lance/data/*.lance"):
        file.write_bytes(b"not lance")
    with pytest.raises(TableError, match=f"{re.escape(uri)}: cannot read it"):
        ExitTable.open(uri)
    for file in Path(uri).glob("exits.lance/_versions/*"):
        file.write_bytes(b"not lance")
    with pytest.raises(TableError, match=f"{re.escape(uri)}: cannot"):
        ExitTable.open(uri)


def test_other_columns(uri, table):
    records = {"binding": binding_record(metadata()), "change": Change("created").to_json()}
    rows = records_to_arrow(records, row_schema(16))
    lancedb.connect(uri).create_table(EXITS, data=rows, mode="overwrite")
    with pytest.raises(TableError, match=r"columns are(.|\n)*expected"):
        ExitTable.open(uri)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": unit_vectors(2) * 3}, "length 3.000, not 1"),
        ({"golds": np.array([0, 2])}, r"gold label 2 is not within 0\.\.1"),
        ({"golds": np.array([0, -1])}, "gold label -1"),
        ({"golds": None}, "gold has 2 empty cells"),
        ({"plain_probs": np.zeros((2, 3))}, r"plain_probs has cells of \[3\].*expected 4"),
        ({"plain_probs": None}, "plain_probs has 2 empty cells"),
        ({"full_logprobs": np.full((2, 2), -np.inf)}, "full_logprobs.*not finite"),
    ],
)
def test_bad_rows_are_named(uri, table, change, message):
    table.add("sst2", dataclasses.replace(label_rows(["a", "b"]), **change))
    with pytest.raises(TableError, match=f"{re.escape(uri)}: rows of task sst2: .*{message}"):
        table.rows("sst2")


def test_info_describes_tasks_binding_and_rates(uri, table):
    add_all(table, "sst2", fitting_rows())
    table.put_task(entry("xsum"))
    add_all(table, "mr", label_rows(["a", "b"]))
    text = "\n".join(describe(uri))
    assert f"exit table {uri}: 62 rows" in text and f"version    {table.version}" in text
    assert "unseen" not in text
    assert "LlamaForCausalLM (4 layers" in text and "minilm (8 dimensions" in text
    assert "sst2: 60 rows" in text and "terrible, great" in text
    fit = table.fit("sst2")
    rates = zip(fit.layers, fit.is_right.mean(axis=0), strict=True)
    assert f"probes {fit.digest}" in text
    assert "  ".join(f"{layer}: {share:.0%}" for layer, share in rates) in text
    assert "xsum: 0 rows" in text and "build has not finished" in text
    assert "no probes: it has 2 rows, and probes need at least 40" in text
