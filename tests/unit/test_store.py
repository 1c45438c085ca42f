"""Exit tables on disk: what goes in comes out, and what is wrong is named with the table's URI."""

import dataclasses
import json
import re
from pathlib import Path

import lancedb
import numpy as np
import pytest

from raee_serve.errors import BindingError, TableError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.table.columns import records_to_arrow
from raee_serve.table.evidence import AGREEMENT, evidence_of
from raee_serve.table.info_command import describe
from raee_serve.table.records import Change, binding_record
from raee_serve.table.schema import EncoderIdentity, TableMetadata, TaskRows, row_id, row_schema
from raee_serve.table.store import EXITS, ExitTable
from tests.unit.table_rows import BACKBONE, ENCODER, entry, label_rows, metadata, unit_vectors

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
    for name in ("vectors", "golds", "label_logprobs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))


def test_free_text_rows_and_texts_come_back(table):
    table.put_task(entry("xsum"))
    scores = np.array([[-3.0, -1.0], [-2.0, -0.5]], np.float32)
    agreement = np.array([[AGREEMENT - 0.01, 1], [AGREEMENT + 0.01, 1]], np.float32)
    rows = TaskRows(
        ["x", "y"],
        unit_vectors(2),
        reference_logprob=scores,
        agreement=agreement,
        texts=["one", "two"],
    )
    table.add("sst2", label_rows(["a"]))
    table.add("xsum", rows)
    found = table.rows("xsum")
    assert found.texts == ["one", "two"] and found.golds is None
    np.testing.assert_array_equal(found.agreement, agreement)
    evidence = evidence_of(found, entry("xsum"), 4)
    expected = [[0, 0, 0, np.exp(-1)], [0, np.exp(-2), 0, np.exp(-0.5)]]
    np.testing.assert_allclose(evidence, expected, rtol=1e-6)


def test_evidence_is_the_probability_of_gold_where_it_is_the_most_probable(table):
    table.add("sst2", label_rows(["a"], right=[[0.9, 0.4, 0.6, 0.3]], golds=[1]))
    evidence = evidence_of(table.rows("sst2"), entry("sst2"), 4)
    np.testing.assert_allclose(evidence, [[0.9, 0, 0.6, 0]], rtol=1e-6)


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
        (json.dumps({"format": 99, "metric": "cosine"}), r"\(99, 'cosine'\).*formats 1 and 2"),
        (json.dumps({"format": 2, "metric": "l2"}), r"\(2, 'l2'\)"),
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
        ({"label_logprobs": np.zeros((2, 3, 2))}, r"label_logprobs has cells of \[6\].*expected 8"),
        ({"label_logprobs": None}, "label_logprobs has 2 empty cells"),
        ({"label_logprobs": np.full((2, 4, 2), -np.inf)}, "label_logprobs.*not finite"),
    ],
)
def test_bad_rows_are_named(uri, table, change, message):
    table.add("sst2", dataclasses.replace(label_rows(["a", "b"]), **change))
    with pytest.raises(TableError, match=f"{re.escape(uri)}: rows of task sst2: .*{message}"):
        table.rows("sst2")


def test_info_describes_tasks_binding_and_rates(uri, table):
    table.add("sst2", label_rows(["a", "b"], right=[[0.9, 0.4, 0.6, 0.6]] * 2))
    table.put_task(entry("xsum"))
    text = "\n".join(describe(uri))
    assert f"exit table {uri}: 2 rows" in text and "version    4" in text
    assert "unseen" not in text
    assert "LlamaForCausalLM (4 layers" in text and "minilm (8 dimensions" in text
    assert "sst2: 2 rows" in text and "terrible, great" in text
    assert "1: 100%  2: 0%  3: 100%  4: 100%" in text
    assert "xsum: 0 rows" in text
