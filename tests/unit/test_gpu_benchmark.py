"""`benchmarks.gpu` but for the engines: those here answer at once, with the times of a model."""

import json
from itertools import accumulate
from math import inf, isclose
from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks.deadline import Deadline
from benchmarks.engine_process import EngineError
from benchmarks.fleet import Fleet, fitting, superfluous
from benchmarks.gpu import is_sound, shape_measured
from benchmarks.gpu_check import gap, verdict
from benchmarks.gpu_rows import MIN_PAIRS, as_line, drawn, measure, rows
from benchmarks.shapes import SHAPES
from benchmarks.workloads import WORKLOADS

pytestmark = pytest.mark.unit

TINY = SHAPES["tiny"]
START_S, EMBEDDING_S = 50.0, 0.2


def layer_s(num_requests):
    """Of one layer: a part that is the same for any batch, and a part that grows with it."""
    return 0.05 + 0.002 * num_requests


class Engine:
    """Vanilla, or one that takes the ideal time for mixed depths and some of it more."""

    def __init__(self, machinery, name, engine, is_ours):
        self.name, self._machinery, self._is_ours = name, machinery, is_ours
        config = json.loads((Path(engine["model"]) / "config.json").read_text())
        self._depth = config["num_hidden_layers"]

    def ready(self, timeout_s):
        self._machinery.now += START_S / 2  # two are started side by side
        if self._depth == self._machinery.broken_depth:
            raise EngineError(f"{self.name} ended early:\nout of memory")
        return {"startup_s": START_S}

    def ask(self, job, timeout_s):
        n = len(job["prompts"])
        exits = job["exit_layers"] or [self._depth] * n
        assert (job["exit_layers"] is not None) == self._is_ours
        alive = (sum(e > layer for e in exits) for layer in range(self._depth))
        seconds = EMBEDDING_S + sum(layer_s(n) for n in alive if n)
        seconds *= self._machinery.slowness if self._is_ours else 1
        seconds *= 1 + self._machinery.now / 1000  # the device slows down as it gets warm
        self._machinery.now += seconds
        return {"seconds": seconds}

    def close(self):
        self._machinery.running.remove(self.name)


class Machinery:
    """Engines on a device that has room for so many of the whole shape."""

    def __init__(self, workdir, room=20, slowness=1.0, broken_depth=None):
        self.workdir, self.slowness, self.broken_depth = workdir, slowness, broken_depth
        self.memory_bytes = room * Fleet(TINY, self, None)._bytes(TINY.num_layers)
        self.now, self.running, self.started, self.most = 0.0, [], [], 0

    def start(self, name, engine, exit_points=None):
        self.running.append(name)
        self.started.append(name)
        self.most = max(self.most, len(self.running))
        return Engine(self, name, engine, is_ours=exit_points is not None)

    def fleet(self, seconds=inf):
        return Fleet(TINY, self, Deadline(seconds, lambda: self.now))


@pytest.fixture
def by_name():
    planned = rows(TINY.num_layers, table=[0.25] * 4)
    return {row.depths: row for row in planned if row.workload.name == "decode-heavy"}


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_takes_whole_and_cut_shapes(name, tmp_path):
    shape = SHAPES[name]
    whole, cut = (
        AutoConfig.from_pretrained(shape.write(depth, tmp_path / str(depth)))
        for depth in (shape.num_layers, 5)
    )
    assert (whole.num_hidden_layers, cut.num_hidden_layers) == (shape.num_layers, 5)
    assert {k: getattr(whole, k) for k in shape.config if k != "rope_parameters"} == {
        k: getattr(cut, k) for k in shape.config if k != "rope_parameters"
    }
    assert whole.rope_parameters == cut.rope_parameters
    if name == "gemma-2-9b":
        assert cut.layer_types == whole.layer_types[:5]
        assert set(cut.layer_types) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize(("name", "parameters"), [("llama-3.1-8b", 8.03e9), ("gemma-2-9b", 9.24e9)])
def test_shapes_have_the_published_size(name, parameters):
    shape = SHAPES[name]
    assert shape.weight_bytes(shape.num_layers) == pytest.approx(2 * parameters, rel=0.002)
    assert shape.kv_bytes(shape.num_layers, 1) == {32: 131072, 42: 344064}[shape.num_layers]


def test_the_most_important_rows_are_first():
    named = [(row.depths, row.workload.name) for row in rows(32)]
    assert list(dict.fromkeys(depths for depths, _ in named))[:3] == [
        "full",
        "half",
        "half-shallow",
    ]
    assert "table" not in dict(named)
    assert [w for depths, w in named if depths == "half-shallow"] == [
        "decode-heavy",
        "prefill-heavy",
    ]
    assert [w for depths, w in named if depths == "full"] == list(WORKLOADS)
    assert ("table", "decode-heavy") in [(r.depths, r.workload.name) for r in rows(32, [1.0])]


def test_a_tables_exits_are_at_the_same_share_of_the_layers():
    assert set(drawn([0, 0, 0, 1], 42, 64)) == {42}
    assert set(drawn([0] * 6 + [1] + [0] * 5, 42, 64)) == {28}  # 24.5 of 42, and 21 is too shallow
    assert set(drawn([0] * 11 + [1] + [0] * 6, 42, 64)) == {28}  # exactly
    exits = drawn([0.5, 0, 0, 0, 0, 0.5], 32, 64)
    assert set(exits) == {11, 32}
    assert 20 < exits.count(32) < 44 and exits == drawn([0.5, 0, 0, 0, 0, 0.5], 32, 64)


@pytest.mark.parametrize("room", [20, 3])
@pytest.mark.parametrize("slowness", [1.0, 1.25])
@pytest.mark.parametrize("depths", ["full", "half", "half-shallow", "table", "six-depths"])
def test_an_engine_that_takes_the_ideal_time_has_efficiency_1(
    depths, slowness, room, by_name, tmp_path
):
    machinery = Machinery(tmp_path, room, slowness)
    fleet = machinery.fleet()
    found = measure(fleet, by_name[depths], pairs=12)
    assert found.pairs == 12
    assert found.efficiency.median == pytest.approx(1 / slowness, rel=0.01)
    alone = EMBEDDING_S + TINY.num_layers * layer_s(64)
    layers = (sum(e > layer for e in by_name[depths].exits) for layer in range(TINY.num_layers))
    ideal = EMBEDDING_S + sum(layer_s(n) for n in layers if n)
    assert found.speedup.median == pytest.approx(alone / ideal / slowness, rel=0.01)
    fleet.close()
    assert machinery.running == [] and machinery.most <= room


def test_engines_go_when_others_need_the_room(by_name, tmp_path):
    machinery = Machinery(tmp_path, room=3)
    fleet = machinery.fleet()
    fleet.bring([6, 3, 2, 4, 1])
    assert list(fleet.depths) == [6, 3]
    measure(fleet, by_name["half-shallow"], pairs=2)
    assert list(fleet.depths) == [6, 2]
    assert machinery.started.count("tiny raee-serve") == 1


def test_what_fits_and_what_has_to_go():
    assert fitting([8, 4, 3, 2], 15, float) == [8, 4, 3]
    assert fitting([8, 4, 3], 5, float) == [8, 4]
    assert superfluous([8, 4, 3], [8, 3], 20, float) == []
    assert superfluous([8, 4, 3, 2], [8, 5], 16, float) == [4, 3]


def test_what_there_is_no_time_for_is_marked(tmp_path):
    machinery = Machinery(tmp_path)
    result = shape_measured(machinery.fleet(seconds=300), None, pairs=12)
    measured = [line["measured"] for line in result["rows"]]
    assert measured[0] and not measured[-1] and len(measured) == len(rows(TINY.num_layers))
    assert all(line.get("pairs", MIN_PAIRS) >= MIN_PAIRS for line in result["rows"])
    assert machinery.now < 300 + START_S


def test_nothing_is_started_that_would_not_be_up_in_time(by_name, tmp_path):
    machinery = Machinery(tmp_path, room=3)
    fleet = machinery.fleet(seconds=120)
    fleet.bring([6, 3])
    assert machinery.now > 120 - START_S
    result = shape_measured(fleet, None, pairs=2)
    assert [name for name in machinery.started if " 2 layers" in name] == []
    assert {line["depths"] for line in result["rows"] if line["measured"]} <= {"full", "half"}


def test_an_engine_that_fails_ends_its_shape_alone(tmp_path):
    machinery = Machinery(tmp_path, room=3, broken_depth=2)
    result = shape_measured(machinery.fleet(), None, pairs=2)
    assert "out of memory" in result["error"]
    measured = {line["depths"] for line in result["rows"] if line["measured"]}
    assert measured == {"full", "half"}
    assert not is_sound({"shapes": {"tiny": result}})
    assert is_sound({"shapes": {}, "parity": {"wrong": 0}})
    assert not is_sound({"shapes": {}, "parity": {"wrong": 1}})


def test_a_line_says_whether_the_bar_is_met(by_name, tmp_path):
    row = by_name["half"]
    assert as_line(row, None).endswith("not measured")
    for slowness, verdict_ in ((1.0, "met"), (1.1, "missed")):
        fleet = Machinery(tmp_path, slowness=slowness).fleet()
        assert as_line(row, measure(fleet, row, 6)).endswith(f"0.95 {verdict_}")
    third = by_name["third"]
    assert as_line(third, measure(Machinery(tmp_path).fleet(), third, 6)).endswith("-")


def test_a_tie_is_no_difference():
    logprobs = [{"5": -0.1, "7": -2.0}, {"8": -1.0, "9": -1.00005}]
    assert gap([5, 8], [5, 8], logprobs) is None
    assert isclose(gap([5, 9], [5, 8], logprobs), 0.00005, rel_tol=1e-6)
    assert gap([7, 8], [5, 8], logprobs) == pytest.approx(1.9)
    assert gap([6, 8], [5, 8], logprobs) == inf
    told = verdict([None, 0.00005, 1.9, inf])
    assert (told["requests"], told["equal"], told["ties"], told["wrong"]) == (4, 1, 1, 2)
    assert told["largest_gap"] == 1.9  # JSON has no infinity


def test_the_time_left_is_shared_out():
    now = accumulate([0, 0, 0, 10])
    assert Deadline(600, lambda: next(now)).share(of=2).left_s == pytest.approx(300 - 10)
