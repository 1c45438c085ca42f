"""A build that can no longer write: what is committed stays, the error says why, and it goes on."""

import contextlib
import resource

import pytest

from raee_serve import cli
from raee_serve.table.build import TaskBuilder
from raee_serve.table.store import ExitTable
from tests.tiny import tokenized_llama
from tests.unit.test_build import EXAMPLES, write_data

pytestmark = pytest.mark.unit

FIRST = 8


@contextlib.contextmanager
def files_limited_to(num_bytes):
    """Every write beyond it fails, as on a full disk; the kernel says "File too large"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def started(tmp_path, smollm2, capsys):
    """(command, uri) of a build of which the first rows are done."""
    model = str(tokenized_llama(tmp_path / "model", smollm2))
    uri = str(tmp_path / "table")
    command = ["build", "--model", model, "--task", "sst2", "--table", uri]
    command += ["--data", str(write_data(tmp_path / "data"))]
    assert cli.main([*command, "--limit", str(FIRST)]) == 0
    assert f"{FIRST} rows added" in capsys.readouterr().out
    return command, uri


@pytest.mark.parametrize(
    ("num_bytes", "where"), [(3000, "write its states"), (12_000, "change it")]
)
@pytest.mark.parametrize("options", [[], ["--replace"]], ids=["add", "replace"])
def test_a_full_disk_ends_the_build_and_costs_nothing(
    num_bytes, where, options, started, capsys, monkeypatch
):
    """In the states of the first row that would be written, or, these written, in the row."""
    command, uri = started
    before = ExitTable.open(uri).row_ids("sst2")
    build = TaskBuilder.build

    def on_a_full_disk(*args, **kwargs):
        with files_limited_to(num_bytes):
            return build(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TaskBuilder, "build", on_a_full_disk)
        assert cli.main([*command, *options]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"raee-serve build: error: exit table {uri}: cannot {where}")
    assert "File too large" in last

    table = ExitTable.open(uri)
    assert table.row_ids("sst2") == before and table.count_rows() == FIRST
    assert cli.main(["table", "check", uri]) == 0
    assert cli.main([*command, *options]) == 0
    kept = 0 if options else FIRST
    assert f"{len(EXAMPLES) - kept} rows added, {kept} kept" in capsys.readouterr().out
    assert ExitTable.open(uri).count_rows() == len(EXAMPLES)


def test_a_table_that_cannot_be_made_is_named_and_made_later(tmp_path, smollm2, capsys):
    model = str(tokenized_llama(tmp_path / "model", smollm2))
    uri = str(tmp_path / "table")
    command = ["build", "--model", model, "--task", "sst2", "--table", uri, "--limit", "2"]
    command += ["--data", str(write_data(tmp_path / "data"))]
    with files_limited_to(100):
        assert cli.main(command) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"raee-serve build: error: exit table {uri}: cannot create it")
    assert cli.main(command) == 0 and ExitTable.open(uri).count_rows() == 2
