"""Data files: every encoding and format is read, or refused in one line that names the place."""

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from raee_serve.errors import TaskError
from raee_serve.tasks.data_files import brief, decoded, expanded, file_cells, listed, shown

pytestmark = pytest.mark.unit

CSV = 'body,label\nfine,a\n"two\nlines, ""quoted""",b\n\nlast\u2028one,a\n'
CELLS = [(2, ("fine", "a")), (3, ('two\nlines, "quoted"', "b")), (6, ("last\u2028one", "a"))]
COLUMNS = ("body", "label")


def read(path, columns=COLUMNS):
    return list(file_cells(path, columns))


def refusal(path, columns=COLUMNS):
    """The one line that a file is refused in, which names the file."""
    with pytest.raises(TaskError) as error:
        read(path, columns)
    message = str(error.value)
    assert "\n" not in message and path.name in message
    return message


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", CSV),
        ("a.CSV", CSV),
        ("a.v2.csv", CSV),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.csv", CSV.encode("utf-16")),
        ("a.csv", b"\xfe\xff" + CSV.encode("utf-16-be")),
        ("a.csv", CSV.encode("utf-32")),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.csv.gz", gzip.compress(CSV.encode("utf-16"), mtime=0)),
        ("a.tsv", 'body\tlabel\nfine\ta\n"two\nlines, ""quoted"""\tb\n\nlast\u2028one\ta\n'),
    ],
)
def test_encodings_and_endings_of_separated_values(tmp_path, name, data):
    file = write(tmp_path / name, data)
    assert read(file) == [(f"{file}:{line}", cells) for line, cells in CELLS]


def test_crlf_line_ends(tmp_path):
    file = write(tmp_path / "a.csv", "body,label\r\nfine,a\r\n\r\nnot,b")
    assert read(file) == [(f"{file}:2", ("fine", "a")), (f"{file}:4", ("not", "b"))]


def test_columns_come_in_the_order_asked_for(tmp_path):
    file = write(tmp_path / "a.csv", "id,label,body\n1,a,fine\n")
    assert read(file)[0][1] == ("fine", "a")


def test_a_field_may_be_longer_than_the_csv_modules_limit(tmp_path):
    file = write(tmp_path / "a.csv", f"body,label\n{'x' * 300_000},a\n")
    assert len(read(file)[0][1][0]) == 300_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", ":1: column 'body' is missing; there are: none"),
        ("body;label\nx;a\n", ":1: column 'body' is missing; there are: 'body;label'"),
        ("label,id\n", ":1: column 'body' is missing; there are: 'label', 'id'"),
        ("body,label,body\nx,a,y", ":1: column 'body' stands there twice"),
        ("body,label\nx,a\ny\n", ":3: 1 fields, and the header has 2"),
        ("body,label\nx, y,a\n", ":2: 3 fields, and the header has 2; a field that holds ','"),
        ('body,label\nx,a\n"y,a\nz,b\n', ":3: unexpected end of data; a field that begins with"),
        ('body,label\n"y" z,a\n', ":2: ',' expected after '\"'"),
        (
            "body,label\nok,a\ncafé,a\n".encode("latin-1"),
            ":3: byte 0xe9 is not UTF-8 here; allowed: UTF-8, or UTF-16",
        ),
        (
            "body,label\nok \ud83d,a\n".encode("utf-8", "surrogatepass"),
            ":2: byte 0xed is not UTF-8",
        ),
        (
            b"\xff\xfe" + "body,label\nĊ,b\nx".encode("utf-16-le") + b"\x00\xd8\x20\x00",
            ":3: byte 0x00 is not UTF-16 here",
        ),
    ],
)
def test_bad_separated_values_are_refused(tmp_path, data, message):
    assert message in refusal(write(tmp_path / "a.csv", data))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv.gz", CSV, "cannot read"),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)[:-9], "ended before the end-of-stream"),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)[:12] + b"\xff" * 30, "cannot read"),
        ("a.csv", gzip.compress(CSV.encode(), mtime=0), ":1: byte 0x8b is not UTF-8"),
        ("a.xlsx", CSV, "allowed endings: .csv, .tsv, .jsonl, .ndjson, .parquet, each also"),
        ("a.gz", CSV, "allowed endings"),
        ("csv", CSV, "allowed endings"),
        ("a.parquet", b"", "cannot be read as Parquet"),
        ("a.parquet", b"PAR1" * 10, "cannot be read as Parquet"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, data, message):
    assert message in refusal(write(tmp_path / name, data))


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    assert "is a directory; a file is needed" in refusal(tmp_path / "folder.csv")
    assert "No such file" in refusal(tmp_path / "missing.csv")
    assert "Not a directory" in refusal(write(tmp_path / "a", "") / "b.csv")
    assert "too long" in refusal(tmp_path / f"{'x' * 300}.csv")
    with pytest.raises(TaskError, match=r"cannot read '.*b\\x00\.csv': embedded null"):
        read(tmp_path / "b\0.csv")


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    text = '{"body": "fine\u2028film", "label": 1, "id": null}\r\n\n{"label": "x", "body": null}'
    data = text.encode("utf-8-sig")
    file = write(tmp_path / name, gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    assert read(file) == [(f"{file}:1", ("fine\u2028film", 1)), (f"{file}:3", (None, "x"))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not JSON: Expecting property name enclosed in double quotes at character 2"),
        ("[]", ":2: a list; allowed: an object"),
        ("3", ":2: a number; allowed: an object"),
        ('{"body": "x"}', ":2: column 'label' is missing; there are: 'body'"),
        ("{}", ":2: column 'body' is missing; there are: none"),
        (f'{{"label": {"9" * 5000}}}', ":2: a number is too long; allowed: 4,300 digits"),
        ("[" * 100_000, ":2: nested too deeply"),
        ('{"a": ' * 50_000, ":2: nested too deeply"),
    ],
)
def test_bad_json_lines_are_refused(tmp_path, line, message):
    good = json.dumps({"body": "x", "label": 1})
    assert message in refusal(write(tmp_path / "a.jsonl", f"{good}\n{line}\n{good}"))


def test_many_columns_are_not_all_listed(tmp_path):
    row = {f"column {number}": number for number in range(200)}
    assert "'column 11' and 188 more" in refusal(write(tmp_path / "a.jsonl", json.dumps(row)))


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet(tmp_path, name):
    file, raw = tmp_path / name, tmp_path / "raw"
    columns = {"label": [1, None], "body": pa.array(["x", None]).dictionary_encode(), "n": [1, 2]}
    parquet.write_table(pa.table(columns), raw)
    data = raw.read_bytes()
    write(file, gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    assert read(file) == [(f"{file}: row 1", ("x", 1)), (f"{file}: row 2", (None, None))]
    assert "column 'text' is missing; there are: 'label', 'body', 'n'" in refusal(file, ("text",))


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    texts = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\6\0\0\0"), pa.py_buffer(b"okcaf\xe9")
    )
    parquet.write_table(pa.table({"body": texts, "label": [1, 2]}), tmp_path / "a.parquet")
    assert "a.parquet: row 2: cannot be read" in refusal(tmp_path / "a.parquet")


def test_decoded_heeds_a_byte_order_mark(tmp_path):
    assert decoded(write(tmp_path / "a", "é".encode("utf-8-sig"))) == "é"
    assert decoded(write(tmp_path / "a", "é".encode("utf-16"))) == "é"


def test_home_and_empty_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(expanded("~/a.csv")) == "/somewhere/a.csv"
    with pytest.raises(TaskError, match="empty path"):
        expanded("")
    with pytest.raises(TaskError, match="nobody-of-that-name"):
        expanded("~nobody-of-that-name/a.csv")


def test_what_messages_show_is_one_line_and_short():
    assert shown("a b.csv") == "a b.csv" and shown("a\nb") == "'a\\nb'"
    assert brief("\ud800\n") == "'\\ud800\\n'"
    assert len(brief("x" * 1000)) == 60 and brief(10**5000) == "a long int"
    assert listed([str(n) for n in range(14)]).endswith("'11' and 2 more")
