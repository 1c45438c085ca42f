"""What `benchmarks.throughput` measures, and what it says of the times."""

from argparse import ArgumentTypeError
from types import SimpleNamespace

import pytest

from benchmarks.throughput import figures
from benchmarks.throughput_comparison import Comparison, Rounds
from benchmarks.throughput_figures import Mixed, Uniform
from benchmarks.workloads import WORKLOADS, workload_named

pytestmark = pytest.mark.unit

ROUNDS = Rounds(starts=1, pairs=2)


class Systems(Comparison):
    """Systems that have names and nothing to run."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._seed = 0
        self.ours_system = SimpleNamespace(name="ours", vocab_size=100)

    @property
    def ours(self):
        return self.ours_system

    def cut(self, depth):
        return SimpleNamespace(name=f"cut to {depth}", vocab_size=100)


def result() -> dict:
    return {"full_depth_ratio": {}, "uniform": {}, "mixed": {}}


@pytest.mark.parametrize(
    ("text", "num_requests"), [("decode-heavy", 64), ("prefill-heavy:8", 8), ("single:9", 1)]
)
def test_a_workload_by_name_and_number(text, num_requests):
    workload = workload_named(text)
    assert workload.name == text.partition(":")[0]
    assert workload.num_requests == num_requests


@pytest.mark.parametrize("text", ["heavy", "single:", "single:0", "single:-1", "single:x", ""])
def test_workloads_that_there_are_not(text):
    with pytest.raises(ArgumentTypeError, match="allowed: decode-heavy, prefill-heavy, single"):
        workload_named(text)


def test_full_depth_is_measured_beside_any_other_and_mixes_of_several_requests():
    workloads = [WORKLOADS["single"], WORKLOADS["decode-heavy"]]
    uniform, also, mix = figures(30, workloads, ["third"], ["half-shallow"])
    assert uniform == Uniform(WORKLOADS["single"], [10, 30])
    assert also == Uniform(WORKLOADS["decode-heavy"], [10, 30])
    assert (mix.workload.name, mix.mix) == ("decode-heavy", "half-shallow")
    assert sorted(set(mix.exits)) == [10, 30]


def test_no_depth_asked_for_leaves_the_mixes():
    (mix,) = figures(30, [WORKLOADS["single"], WORKLOADS["decode-heavy"]], [], ["six-depths"])
    assert (mix.workload.name, mix.mix) == ("decode-heavy", "six-depths")


def test_systems_of_a_group_have_the_same_prompts():
    (group,) = Uniform(WORKLOADS["single"], [30]).groups(Systems(30))
    ((_, ours),), ((_, cut),) = group.values()
    assert ours["prompts"] == cut["prompts"]
    assert (ours["exit_layers"], cut["exit_layers"]) == ([30], None)


def test_a_later_group_has_other_prompts(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "benchmarks.throughput_comparison.run_side_by_side",
        lambda jobs: {
            name: asked.append(parts[0][1]["prompts"]) or 1.0 for name, parts in jobs.items()
        },
    )
    systems = Systems(30)
    systems.close = lambda: None
    figure = Uniform(WORKLOADS["single"], [10, 30])
    times = ROUNDS.times(systems, lambda: figure.groups(systems))
    assert {name: len(found) for name, found in times.items()} == {
        "single, ours, 10": 2,
        "single, cut, 10": 2,
        "single, ours, 30": 2,
        "single, cut, 30": 2,
    }
    assert len({str(prompts) for prompts in asked}) == 2 * 3


def test_what_uniform_depths_took_becomes_ratios():
    found = result()
    times = {
        "single, ours, 10": [2.0, 2.0],
        "single, cut, 10": [1.0, 1.0],
        "single, ours, 30": [4.0, 4.0],
        "single, cut, 30": [4.0, 4.0],
    }
    Uniform(WORKLOADS["single"], [10, 30]).put_into(found, times, ROUNDS)
    assert found["full_depth_ratio"]["single"]["median"] == 1
    assert found["uniform"]["single"][10]["efficiency"]["median"] == 0.5
    assert found["uniform"]["single"][10]["speedup"]["median"] == 2


def test_what_a_mix_took_is_set_against_what_is_left_of_its_parts():
    found = result()
    exits = [10, 30] * 32
    times = {
        "decode-heavy, half, ours": [4.0, 4.0],
        "decode-heavy, half, added": [5.0, 5.0],
        "decode-heavy, half, taken away": [2.0, 2.0],
        "decode-heavy, half, vanilla": [8.0, 8.0],
    }
    Mixed(WORKLOADS["decode-heavy"], "half", exits).put_into(found, times, ROUNDS)
    mix = found["mixed"]["decode-heavy"]["half"]
    assert mix["efficiency"]["median"] == 0.75
    assert (mix["speedup"]["median"], mix["mean_depth"]) == (2, 20)
