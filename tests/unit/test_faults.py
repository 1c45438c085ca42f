"""Look-ups through a real table and encoder, with what can break broken: no request ever fails."""

import contextlib
import fcntl
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from raee_serve.errors import BindingError, TableError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.records import Reason
from raee_serve.server.admission import Admission
from raee_serve.server.engine_client import DepthClient
from raee_serve.server.gate import Gate
from raee_serve.server.loading import TableLoader
from raee_serve.server.metrics import DecisionMetrics
from raee_serve.server.settings import DepthSettings
from raee_serve.table.schema import TableMetadata
from raee_serve.table.store import ExitTable
from tests.unit.label_tables import TEXTS, new_table, put_labels
from tests.unit.serving import LOOP, Server
from tests.unit.table_rows import BACKBONE

pytestmark = pytest.mark.unit

NUM_LAYERS, LAYER = BACKBONE.num_layers, 2
NAMED = {"task": "sst2"}


@pytest.fixture
def uri(tmp_path, encoder, tokenizer):
    """Rows that are right at layer 2 of 4, too few for probes, with an index."""
    uri = str(tmp_path / "table")
    table = new_table(uri, BACKBONE, encoder)
    put_labels(table, "sst2", TEXTS, encoder, tokenizer, layer=LAYER)
    table.build_index("IVF_FLAT")
    return uri


class Front:
    """The front end with a real gate; the engine behind it only notes."""

    def __init__(self, uri, tokenizer, **settings):
        settings = {"lookup_timeout_ms": 60_000, "encoder_backend": "torch", **settings}
        self.loader = TableLoader(DepthSettings(uri, **settings), BACKBONE, tokenizer, [])
        self.server, self.registry = Server(), CollectorRegistry()
        metrics = DecisionMetrics(NUM_LAYERS, self.registry)
        self.gate = self.loader.load(Gate(Admission(NUM_LAYERS), None, str, metrics))
        self.server.app.state.engine_client = DepthClient(self.server.engine, self.gate, LOOP)
        self.asked = 0

    @property
    def model(self):
        """The sentence-transformers model that embeds."""
        return self.loader._retriever._encoder._encoder._model

    def ask(self):
        """Reason and exit layer, as they are stated, of a text that no look-up has seen."""
        self.asked += 1
        answer = self.server.post(prompt=f"a fine film, {self.asked} It was", raee=NAMED)
        assert answer.status_code == 200 and answer.json()["choices"]
        layer = int(answer.headers["x-raee-exit-layer"])
        assert self.server.exit_layers()[-1] == layer
        return answer.headers["x-raee-reason"], layer

    def counted(self, reason):
        labels = {"reason": reason, "task": "sst2"}
        return self.registry.get_sample_value("raee_decisions_total", labels)


RETRIEVED = (Reason.RETRIEVED, LAYER)


def raising(*_, **__):
    raise RuntimeError("out of memory")


def not_finite(texts, **_):
    return np.full((len(texts), 384), np.nan, np.float32)


def of_another_size(texts, **_):
    return np.ones((len(texts), 8), np.float32)


def too_few(texts, **_):
    return np.ones((0, 384), np.float32)


@pytest.mark.parametrize("broken", [raising, not_finite, of_another_size, too_few])
def test_an_encoder_that_breaks_means_full_depth_until_it_is_well(
    broken, uri, tokenizer, monkeypatch
):
    front = Front(uri, tokenizer)
    assert front.ask() == RETRIEVED
    with monkeypatch.context() as patch:
        patch.setattr(front.model, "encode", broken)
        assert [front.ask() for _ in range(3)] == [(Reason.ERROR, NUM_LAYERS)] * 3
    assert front.counted("error") == 3
    assert front.ask() == RETRIEVED and front.counted("retrieved") == 2


def test_an_encoder_that_hangs_means_full_depth_until_it_goes_on(uri, tokenizer, monkeypatch):
    front, go_on = Front(uri, tokenizer, lookup_timeout_ms=300), threading.Event()
    encode = front.model.encode

    def hanging(texts, **options):
        go_on.wait(60)
        return encode(texts, **options)

    monkeypatch.setattr(front.model, "encode", hanging)
    assert [front.ask() for _ in range(2)] == [(Reason.TIMEOUT, NUM_LAYERS)] * 2
    assert front.counted("timeout") == 2
    go_on.set()
    monkeypatch.undo()
    front.gate.lookups._timeout_s = 60  # however slow this machine is
    assert front.ask() == RETRIEVED


HANGS = """
import asyncio, threading
from raee_serve.retrieval.lookup import Lookup
from raee_serve.server import lookup

lookup.CLOSE_TIMEOUT_S = 0.1
hangs = lambda lookups: threading.Event().wait()
lookups = lookup.LookupBatcher(hangs, num_layers=4, timeout_s=0.1)
print(asyncio.run(lookups.decide([Lookup(("sst2",), "a")]))[0].reason)
lookups.close()
"""


def test_an_encoder_that_hangs_does_not_keep_the_server_from_ending():
    done = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "timeout"


def deleted(uri, encoder):
    shutil.rmtree(uri)


def truncated(uri, encoder):
    for file in filter(Path.is_file, Path(uri).rglob("*")):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def of_another_model(uri, encoder):
    shutil.rmtree(uri)
    other = TableMetadata(BackboneIdentity("Gemma3ForCausalLM", 4, "ef" * 32), encoder.identity())
    ExitTable.open_or_create(uri, other)


@contextlib.contextmanager
def locked(uri):
    """Every file of a table held by somebody else's exclusive lock."""
    with contextlib.ExitStack() as held:
        for path in filter(Path.is_file, Path(uri).rglob("*")):
            fcntl.flock(held.enter_context(path.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


SPOILS = pytest.mark.parametrize("spoil", [deleted, truncated, of_another_model])


@SPOILS
def test_rows_in_memory_need_no_table(spoil, uri, encoder, tokenizer):
    front = Front(uri, tokenizer)
    spoil(uri, encoder)
    assert [front.ask() for _ in range(3)] == [RETRIEVED] * 3


@SPOILS
def test_without_its_table_an_index_finds_nothing(spoil, uri, encoder, tokenizer, tmp_path):
    sound = shutil.copytree(uri, tmp_path / "sound")
    front = Front(uri, tokenizer, rows_in_memory_mb=0)
    assert front.loader._retriever.searches_index
    spoil(uri, encoder)
    assert [front.ask() for _ in range(3)] == [(Reason.ERROR, NUM_LAYERS)] * 3
    assert front.counted("error") == 3
    shutil.rmtree(uri, ignore_errors=True)
    sound.rename(uri)
    assert front.ask() == RETRIEVED


@SPOILS
def test_a_server_does_not_start_with_it(spoil, uri, encoder, tokenizer):
    spoil(uri, encoder)
    expected = BindingError if spoil is of_another_model else TableError
    with pytest.raises(expected, match=uri):
        Front(uri, tokenizer)


@pytest.mark.parametrize("rows_in_memory_mb", [0, 256])
def test_a_lock_on_the_table_is_nobodys_concern(rows_in_memory_mb, uri, tokenizer):
    with locked(uri):
        front = Front(uri, tokenizer, rows_in_memory_mb=rows_in_memory_mb)
        assert front.ask() == RETRIEVED
