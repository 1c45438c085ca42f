"""What `paper` and `peers` measure on servers. One server stands for all of them: not their speed
is tested, but that they are asked the right thing and that their answers are scored."""

from contextlib import nullcontext

import numpy as np
import pytest

from raee_serve.evaluation.suite import paper, peer_speed
from raee_serve.evaluation.suite.dropping import LayerDropping
from raee_serve.evaluation.suite.material import Material, Source
from raee_serve.evaluation.suite.serving import System
from raee_serve.retrieval.aggregate import RULES
from tests.server.conftest import MODEL

pytestmark = pytest.mark.server

PROMPTS = 10


@pytest.fixture(scope="module")
def material(built_table, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("scratch")
    source = Source(MODEL, str(built_table), "/nowhere", PROMPTS, 0, scratch, served=PROMPTS)
    return Material.of(source, ["demo_sentiment"])


def test_paper_serves_what_it_counts_offline(served, material, monkeypatch):
    system = System(served.url, MODEL)
    monkeypatch.setattr(paper, "raee_system", lambda model, table: nullcontext(system))
    found = paper.run(material)
    rows = {row["way"]: row for row in found.rows}
    assert rows["full depth"]["speed"] == 1
    for rule in RULES:
        assert rows[rule]["requests/s"] > 0 and rows[rule]["latency ms"] > 0
    assert np.mean([rows[rule]["as offline"] for rule in RULES]) >= 0.9
    assert "speed" not in rows["full depth, calibrated"]


def test_peers_are_asked_the_same_prompts(served, material, monkeypatch):
    started = []

    def vanilla(checkpoint, model, flags=()):
        started.append((checkpoint.name, *flags))
        return nullcontext(System(served.url, model, decides=False))

    ours = System(served.url, MODEL)
    monkeypatch.setattr(peer_speed, "raee_system", lambda model, table: nullcontext(ours))
    monkeypatch.setattr(peer_speed, "vanilla_system", vanilla)
    rows, notes = peer_speed.measured(material, LayerDropping(material))
    assert [row["way"] for row in rows] == [
        "vanilla vLLM",
        "retrieved exits",
        "static truncation",
        "layers dropped",
        "n-gram drafts",
        "int8 weights",
    ]
    by_way = {row["way"]: row for row in rows}
    retrieved, cut = by_way["retrieved exits"], by_way["static truncation"]
    assert cut["depth"] == by_way["layers dropped"]["depth"]
    assert abs(cut["depth"] - retrieved["depth"]) <= 1 / material.backbone.num_layers
    assert all(0 <= row["accuracy"] <= 1 and row["speed"] > 0 for row in rows) and notes
    whole, first, kept, drafts, int8 = started
    assert whole == (material.checkpoint.name,) and drafts[1] == "--speculative-config"
    n = round(cut["depth"] * material.backbone.num_layers)
    assert (first, kept, int8) == ((f"static-truncation-{n}",), (f"layers-dropped-{n}",), ("int8",))
