"""A table in object storage: everything a directory can do, against a local S3 server."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import timedelta

import pytest

from raee_serve import cli
from raee_serve.errors import TableError
from raee_serve.exits.choice import Choice
from raee_serve.records import Reason
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.retrieval.task_index import MIN_BOUND
from raee_serve.table.store import ExitTable
from tests.tiny import tokenized_llama
from tests.unit.table_rows import (
    BACKBONE,
    HIDDEN,
    add_all,
    entry,
    fitting_rows,
    label_rows,
    metadata,
    replace_all,
)
from tests.unit.test_build import write_data

pytestmark = pytest.mark.unit

URI = "s3://tables/some/where"


@pytest.fixture(scope="module")
def endpoint():
    """An S3 server with an empty bucket `tables`, as the environment of this process says."""
    pytest.importorskip("moto.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("AWS_ENDPOINT_URL", url)
        environment.setenv("AWS_ALLOW_HTTP", "true")
        environment.setenv("AWS_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        while True:
            try:
                request(f"{url}/tables", "PUT")
                break
            except urllib.error.URLError:
                assert server.poll() is None, "the S3 server ended"
                time.sleep(0.1)
        yield url
        server.terminate()


def request(url, method):
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10):
        pass


@pytest.fixture
def uri(endpoint, request):
    return f"{URI}/{request.node.name}"


def test_a_table_lives_in_a_bucket(uri, tmp_path):
    encoder, texts = Encoder("minilm"), ["a fine film", "a dull film", "a film"]
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    add_all(table, "sst2", label_rows(texts, encoder.encode(texts)))
    version = table.version
    assert cli.main(["table", "delete", uri, "--id", texts[2]]) == 0
    assert ExitTable.open(uri).row_ids("sst2") == set(texts[:2])
    assert cli.main(["table", "rollback", uri, "--to", str(version)]) == 0
    ExitTable.open(uri).put_choices({"sst2": Choice(3, 0.9)})
    assert cli.main(["table", "compact", uri, "--keep-days", "0"]) == 0
    assert cli.main(["table", "info", uri]) == 0
    retriever = ExitRetriever.open(uri, backbone=BACKBONE)
    assert retriever.num_rows == 3 and "sst2" in ExitTable.open(uri).metadata.choices
    (decision,) = retriever.decide([Lookup(("sst2",), texts[0])])
    assert decision.reason is Reason.RETRIEVED and decision.distance < MIN_BOUND
    assert cli.main(["table", "drop", uri, "--task", "sst2"]) == 0
    assert [v.rows for v in ExitTable.open(uri).history()] == [3, 0]
    assert not os.path.exists("s3:")


def test_states_and_fits_live_in_a_bucket_too(uri):
    table = ExitTable.open_or_create(uri, metadata())
    add_all(table, "sst2", fitting_rows())
    old = table.entry("sst2").shelf
    replace_all(table, entry("sst2"), fitting_rows(50, seed="new"))
    opened = ExitTable.open(uri)
    assert len(opened.fit("sst2").ids) == 50
    opened.compact(timedelta(0))
    assert opened.states("sst2", opened.fit("sst2").ids).shape == (4, 50, HIDDEN)
    with pytest.raises(TableError, match="are gone"):
        opened._states.read(old, ["a"])


def test_two_writers_in_a_bucket(uri):
    first = ExitTable.open_or_create(uri, metadata())
    second = ExitTable.open_or_create(uri, metadata())
    first.put_task(entry("sst2"))
    second.put_task(entry("sst2"))
    first.add("sst2", label_rows(["a", "b"]))
    second.add("sst2", label_rows(["b", "c"]))
    assert sorted(ExitTable.open(uri).rows("sst2").ids) == ["a", "b", "c"]


def test_build_into_a_bucket(uri, tmp_path, smollm2, capsys):
    model = str(tokenized_llama(tmp_path / "model", smollm2))
    data = str(write_data(tmp_path / "data"))
    command = ["build", "--model", model, "--task", "sst2", "--data", data, "--table", uri]
    assert cli.main([*command, "--limit", "4"]) == 0
    assert cli.main([*command, "--limit", "6"]) == 0
    assert "2 rows added, 4 kept" in capsys.readouterr().out
    assert ExitTable.open(uri).count_rows() == 6


def test_no_table_and_no_bucket(uri):
    with pytest.raises(TableError, match=f"{uri}.*named exits in it"):
        ExitTable.open(uri)
    with pytest.raises(TableError, match=r"s3://nobody/x: cannot open it.*NoSuchBucket"):
        ExitTable.open("s3://nobody/x")
