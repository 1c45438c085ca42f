"""A server takes up a table's new version whole, or goes on with the one it has."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from raee_serve.fingerprint import BackboneIdentity
from raee_serve.records import Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.server.admission import Admission
from raee_serve.server.gate import Gate
from raee_serve.server.loading import TableLoader
from raee_serve.server.metrics import DecisionMetrics
from raee_serve.server.reload import ReloadError, TableReloader
from raee_serve.server.settings import DepthSettings
from raee_serve.table.schema import EncoderIdentity, TableMetadata
from raee_serve.table.store import ExitTable
from raee_serve.table.tasks import get_task
from tests.unit.table_rows import BACKBONE, entry, label_rows, metadata

pytestmark = pytest.mark.unit

TEXTS = ["a wonderful film", "an awful film", "a great book", "a dull book"]


@pytest.fixture
def uri(tmp_path, encoder, tokenizer):
    """Two tasks of two rows; praise is right at layer 2 of 4."""
    uri = str(tmp_path / "table")
    table = ExitTable.open_or_create(uri, metadata(encoder.identity()))
    for name in ("sst2", "mr"):
        table.put_task(as_served(name, tokenizer))
        table.add(name, rows(encoder, TEXTS[:2], layer=2))
    return uri


def as_served(name, tokenizer):
    return replace(entry(name), label_token_ids=get_task(name).label_token_ids(tokenizer))


def rows(encoder, texts, layer):
    right = [0.9 if n == layer else 0.1 for n in (1, 2, 3, 4)]
    return label_rows(texts, encoder.encode(texts), [right] * len(texts))


class Reloading:
    """A reloader of a real table, with a registry of its own."""

    def __init__(self, uri, tokenizer):
        self.registry = CollectorRegistry()
        settings = DepthSettings(table=uri, lookup_timeout_ms=60_000)
        self.loader = TableLoader(settings, BACKBONE, tokenizer, ["model"])
        gate = Gate(Admission(4), None, str, DecisionMetrics(4, self.registry))
        self.reloader = TableReloader(self.loader.load, self.loader.newest_state, uri)
        self.first = self.reloader.start(self.loader.load(gate))

    @property
    def gate(self):
        return self.first.latest

    def outcomes(self):
        names = ("loaded", "kept")
        value = self.registry.get_sample_value
        found = {n: value("raee_table_reloads_total", {"outcome": n}) for n in names}
        return {name: int(count) for name, count in found.items() if count}


@pytest.fixture
def reloading(uri, tokenizer):
    return Reloading(uri, tokenizer)


async def decided(gate, *tasks, text=TEXTS[0]):
    decisions = await gate.lookups.decide(
        [Lookup((task,), text, rule="earliest") for task in tasks]
    )
    return [(decision.exit_layer, decision.reason) for decision in decisions]


def replace_rows(uri, encoder, layer):
    table = ExitTable.open(uri)
    table.begin_replace(table.metadata.tasks["sst2"])
    table.add("sst2", rows(encoder, TEXTS, layer))
    table.finish_replace("sst2", TEXTS)
    table.drop_task("mr")
    return table


def test_the_new_version_decides_and_the_old_one_finishes(uri, encoder, reloading):
    async def scenario():
        old_gate = reloading.gate
        assert await decided(old_gate, "sst2", "mr") == [(2, Reason.RETRIEVED)] * 2
        table = replace_rows(uri, encoder, layer=3)
        assert await decided(reloading.gate, "sst2") == [(2, Reason.RETRIEVED)]
        misses = reloading.loader._retriever._encoder.misses
        old, new = await reloading.reloader.reload()
        assert (old.version, old.rows) == (5, {"mr": 2, "sst2": 2})
        assert (new.version, new.rows) == (table.version, {"sst2": 4})
        assert reloading.gate is not old_gate
        assert await decided(reloading.gate, "sst2") == [(3, Reason.RETRIEVED)]
        assert set(reloading.gate.admission.tasks) == {"sst2"}
        # Who was admitted by the old gate is decided by the old rows, dropped task and all.
        assert await decided(old_gate, "sst2", "mr") == [(2, Reason.RETRIEVED)] * 2
        assert reloading.loader._retriever._encoder.misses == misses  # the vectors are remembered
        assert reloading.outcomes() == {"loaded": 1}
        table.rollback(5)
        await reloading.reloader.reload()
        assert await decided(reloading.gate, "sst2", "mr") == [(2, Reason.RETRIEVED)] * 2

    asyncio.run(scenario())


def test_requests_go_on_while_versions_come_and_go(uri, encoder, reloading):
    """Every decision is that of some version; none is late, failed or missing."""

    async def ask(n):
        await asyncio.sleep(0.002 * n)
        return await decided(reloading.gate, "sst2", text=TEXTS[n % 2])

    async def scenario():
        versions = [ExitTable.open(uri).version, replace_rows(uri, encoder, layer=3).version]
        asked = [asyncio.create_task(ask(n)) for n in range(60)]
        while not all(task.done() for task in asked):
            await asyncio.to_thread(ExitTable.open(uri).rollback, versions[0])
            versions.reverse()
            await reloading.reloader.reload()
        found = {outcome for task in asked for outcome in task.result()}
        assert found <= {(2, Reason.RETRIEVED), (3, Reason.RETRIEVED)}

    asyncio.run(scenario())


def empty(uri, encoder):
    table = ExitTable.open(uri)
    table.drop_task("sst2")
    table.drop_task("mr")


def of_another_backbone(uri, encoder):
    shutil.rmtree(uri)
    other = BackboneIdentity("Gemma3ForCausalLM", 4, "ef" * 32)
    ExitTable.open_or_create(uri, TableMetadata(other, encoder.identity()))


def of_another_encoder(uri, encoder):
    shutil.rmtree(uri)
    ExitTable.open_or_create(uri, metadata(EncoderIdentity("bge", 384, "ef" * 32)))


def damaged(uri, encoder):
    for file in Path(uri).glob("exits.lance/data/*.lance"):
        file.write_bytes(b"not lance")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda uri, _: shutil.rmtree(uri), "the exit table: no such directory"),
        (damaged, "the exit table is missing or damaged; the server's log says more"),
        (empty, "the exit table holds no rows"),
        (of_another_backbone, "the exit table was built for backbone Gemma3ForCausalLM"),
        (of_another_encoder, "the exit table was built with encoder bge"),
    ],
    ids=["missing", "damaged", "empty", "other backbone", "other encoder"],
)
def test_an_unusable_version_leaves_the_loaded_one(uri, encoder, reloading, spoil, why, caplog):
    async def scenario():
        gate = reloading.gate
        spoil(uri, encoder)
        with pytest.raises(ReloadError) as refused:
            await reloading.reloader.reload()
        told = str(refused.value)
        assert told.startswith("version 5 stays loaded: ") and why in told
        assert "/" not in told and uri in caplog.text  # the log says it all
        assert reloading.gate is gate and reloading.outcomes() == {"kept": 1}
        assert await decided(reloading.gate, "sst2") == [(2, Reason.RETRIEVED)]

    asyncio.run(scenario())


def test_watching_takes_up_what_is_good_and_tries_what_is_bad_once(uri, encoder, reloading):
    async def until(condition):
        while not condition():
            await asyncio.sleep(0.02)

    async def scenario():
        watch = asyncio.create_task(reloading.reloader.watch(0.05))
        version = replace_rows(uri, encoder, layer=3).version
        await asyncio.wait_for(until(lambda: reloading.gate.snapshot.version == version), 60)
        shutil.move(uri, uri + "-away")
        await asyncio.wait_for(until(lambda: reloading.outcomes().get("kept")), 60)
        await asyncio.sleep(0.3)  # several more looks
        assert reloading.outcomes()["kept"] == 1
        shutil.move(uri + "-away", uri)
        await asyncio.sleep(0.2)  # the same as is loaded: nothing to do
        loaded = reloading.outcomes()["loaded"]
        ExitTable.open(uri).delete_rows([TEXTS[3]])
        await asyncio.wait_for(until(lambda: reloading.gate.snapshot.rows == {"sst2": 3}), 60)
        assert reloading.outcomes() == {"loaded": loaded + 1, "kept": 1}
        watch.cancel()

    asyncio.run(scenario())
