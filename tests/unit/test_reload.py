"""A server takes up a table's new version whole, or goes on with the one it has."""

import asyncio
import shutil
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
from tests.unit.label_tables import MANY, TEXTS, id_of, new_table, put_labels
from tests.unit.table_rows import BACKBONE, metadata

pytestmark = pytest.mark.unit


@pytest.fixture
def uri(tmp_path, encoder, tokenizer):
    """Two tasks of two rows, without probes; praise is right at layer 2 of 4."""
    uri = str(tmp_path / "table")
    table = new_table(uri, BACKBONE, encoder)
    for name in ("sst2", "mr"):
        put_labels(table, name, TEXTS[:2], encoder, tokenizer)
    return uri


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
    decisions = await gate.lookups.decide([Lookup((task,), text) for task in tasks])
    return [(decision.exit_layer, decision.reason) for decision in decisions]


def replace_rows(uri, encoder, tokenizer, layer, texts=TEXTS):
    table = ExitTable.open(uri)
    put_labels(table, "sst2", texts, encoder, tokenizer, layer=layer, replace=True)
    if "mr" in table.metadata.tasks:
        table.drop_task("mr")
    return table


def test_the_new_version_decides_and_the_old_one_finishes(uri, encoder, tokenizer, reloading):
    async def scenario():
        old_gate = reloading.gate
        assert await decided(old_gate, "sst2", "mr") == [(2, Reason.RETRIEVED)] * 2
        before = ExitTable.open(uri).version
        table = replace_rows(uri, encoder, tokenizer, layer=3)
        assert await decided(reloading.gate, "sst2") == [(2, Reason.RETRIEVED)]
        misses = reloading.loader._retriever._encoder.misses
        old, new = await reloading.reloader.reload()
        assert (old.version, old.rows) == (before, {"mr": 2, "sst2": 2})
        assert (new.version, new.rows) == (table.version, {"sst2": 4})
        assert reloading.gate is not old_gate
        assert await decided(reloading.gate, "sst2") == [(3, Reason.RETRIEVED)]
        assert set(reloading.gate.admission.tasks) == {"sst2"}
        # Who was admitted by the old gate is decided by the old rows, dropped task and all.
        assert await decided(old_gate, "sst2", "mr") == [(2, Reason.RETRIEVED)] * 2
        assert reloading.loader._retriever._encoder.misses == misses  # the vectors are remembered
        assert reloading.outcomes() == {"loaded": 1}
        table.rollback(before)
        await reloading.reloader.reload()
        assert await decided(reloading.gate, "sst2", "mr") == [(2, Reason.RETRIEVED)] * 2

    asyncio.run(scenario())


def test_requests_go_on_while_versions_come_and_go(uri, encoder, tokenizer, reloading):
    """Every decision is that of some version; none is late, failed or missing."""

    async def ask(n):
        await asyncio.sleep(0.002 * n)
        return await decided(reloading.gate, "sst2", text=TEXTS[n % 2])

    async def scenario():
        before = ExitTable.open(uri).version
        newest = replace_rows(uri, encoder, tokenizer, layer=3).version
        versions = [before, newest]
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
        (empty, "the exit table holds no task whose build has finished"),
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
        version = gate.snapshot.version
        assert told.startswith(f"version {version} stays loaded: ") and why in told
        assert "/" not in told and uri in caplog.text  # the log says it all
        assert reloading.gate is gate and reloading.outcomes() == {"kept": 1}
        assert await decided(reloading.gate, "sst2") == [(2, Reason.RETRIEVED)]

    asyncio.run(scenario())


def test_watching_takes_up_what_is_good_and_tries_what_is_bad_once(
    uri, encoder, tokenizer, reloading
):
    async def until(condition):
        while not condition():
            await asyncio.sleep(0.02)

    async def scenario():
        watch = asyncio.create_task(reloading.reloader.watch(0.05))
        version = replace_rows(uri, encoder, tokenizer, layer=3).version
        await asyncio.wait_for(until(lambda: reloading.gate.snapshot.version == version), 60)
        shutil.move(uri, uri + "-away")
        await asyncio.wait_for(until(lambda: reloading.outcomes().get("kept")), 60)
        await asyncio.sleep(0.3)  # several more looks
        assert reloading.outcomes()["kept"] == 1
        shutil.move(uri + "-away", uri)
        await asyncio.sleep(0.2)  # the same as is loaded: nothing to do
        loaded = reloading.outcomes()["loaded"]
        ExitTable.open(uri).delete_rows([id_of(TEXTS[3])])
        await asyncio.wait_for(until(lambda: reloading.gate.snapshot.rows == {"sst2": 3}), 60)
        assert reloading.outcomes() == {"loaded": loaded + 1, "kept": 1}
        watch.cancel()

    asyncio.run(scenario())


class Workers:
    """Hold probe sets. error: of the next load."""

    def __init__(self):
        self.held, self.error = set(), None

    async def call(self, method, args):
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        (self.held.add if method == "load_probes" else self.held.remove)(args[0])


def answered_by(gate):
    """The id of the set by which a gate decides, of which a look-up is to name a probe."""
    return gate.admission.probe_set


def test_new_probes_are_in_the_workers_before_anything_is_decided_by_them(
    uri, encoder, tokenizer, reloading
):
    async def scenario():
        workers = Workers()
        first = reloading.gate
        await first.probes.connect(workers.call, first.probe_set)
        assert workers.held == set()  # two rows have no probes
        replace_rows(uri, encoder, tokenizer, layer=3, texts=MANY)
        await reloading.reloader.reload()
        second = reloading.gate
        assert workers.held == {answered_by(second)} == {second.probe_set.id}
        [decision] = await second.lookups.decide([Lookup(("sst2",), MANY[0])])
        assert (decision.head, decision.probe) == ("probe", f"sst2/{decision.exit_layer}")
        with second.in_use():
            replace_rows(uri, encoder, tokenizer, layer=2, texts=MANY)
            await reloading.reloader.reload()
            third = reloading.gate
            await asyncio.sleep(0.01)
            assert workers.held == {answered_by(second), answered_by(third)}
            assert len(workers.held) == 2
        await asyncio.sleep(0.01)
        assert workers.held == {answered_by(third)}

    asyncio.run(scenario())


def test_probes_that_cannot_be_loaded_leave_the_table_in_use(uri, encoder, tokenizer, reloading):
    async def scenario():
        workers, gate = Workers(), reloading.gate
        await gate.probes.connect(workers.call, gate.probe_set)
        replace_rows(uri, encoder, tokenizer, layer=3, texts=MANY)
        workers.error = RuntimeError("no memory")
        with pytest.raises(ReloadError, match="cannot load the table's probes: no memory"):
            await reloading.reloader.reload()
        assert reloading.gate is gate and reloading.outcomes() == {"kept": 1}
        rows = reloading.registry.get_sample_value("raee_table_rows", {"task": "mr"})
        assert rows == 2  # of the table that is in use
        workers.error = None
        await reloading.reloader.reload()
        assert workers.held == {answered_by(reloading.gate)}

    asyncio.run(scenario())
