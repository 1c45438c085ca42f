"""What `benchmarks.throughput` measures, and what it says of the times."""

import json
import sys
from argparse import ArgumentTypeError
from types import SimpleNamespace

import pytest

from benchmarks.systems import run_side_by_side
from benchmarks.throughput import figures, main
from benchmarks.throughput_comparison import Comparison, Times, measured_starts
from benchmarks.throughput_figures import Mixed, Uniform
from benchmarks.throughput_record import RecordError, starts_of, tell
from benchmarks.workloads import WORKLOADS, workload_named

pytestmark = pytest.mark.unit


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


def test_a_later_group_has_other_prompts_and_the_first_round_is_short(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "benchmarks.throughput_comparison.run_side_by_side",
        lambda jobs: {name: asked.append(parts[0][1]) or 1.0 for name, parts in jobs.items()},
    )
    systems = Systems(30)
    systems.close = lambda: None
    figure = Uniform(WORKLOADS["single"], [10, 30])
    (rounds,) = measured_starts(systems, lambda: figure.groups(systems), 1, 2)
    assert [list(took) for took in rounds] == [figure.names] * 2
    assert len({str(job["prompts"]) for job in asked}) == 2 * 3
    jobs_of_round = 2 * 2
    assert [job["output_len"] for job in asked] == [8] * jobs_of_round + [64] * 2 * jobs_of_round


class Turns:
    """A system that needs some turns for each job, of a second each, and says which it works at."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def run_for(self, _, job=None):
        if job is not None:
            self.job, self.left = job["name"], job["turns"]
        self.left -= 1
        self.said.append(f"{self.name}: {self.job}")
        return 1.0, self.left == 0


def test_systems_take_turns_and_every_other_one_begins_with_its_last_job():
    said: list[str] = []
    ours, shallow, deep = (Turns(name, said) for name in ("ours", "shallow", "deep"))

    def job(name: str, turns: int) -> dict:
        return {"name": name, "turns": turns}

    jobs = {
        "mixed": [(ours, job("mixed", 1))],
        "added": [(shallow, job("added", 2)), (deep, job("added", 1))],
        "vanilla": [(shallow, job("vanilla", 1)), (deep, job("vanilla", 1))],
    }
    assert run_side_by_side(jobs) == {"mixed": 1.0, "added": 3.0, "vanilla": 2.0}
    assert said == [
        *("ours: mixed", "shallow: vanilla", "deep: added"),
        *("shallow: added", "deep: vanilla"),
        "shallow: added",
    ]


def test_what_uniform_depths_took_becomes_ratios():
    found = result()
    times = {
        "single, ours, 10": [2.0, 2.0],
        "single, cut, 10": [1.0, 1.0],
        "single, ours, 30": [4.0, 4.0],
        "single, cut, 30": [4.0, 4.0],
    }
    Uniform(WORKLOADS["single"], [10, 30]).put_into(found, Times(times, 1))
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
    Mixed(WORKLOADS["decode-heavy"], "half", exits).put_into(found, Times(times, 1))
    mix = found["mixed"]["decode-heavy"]["half"]
    assert mix["efficiency"]["median"] == 0.75
    assert (mix["speedup"]["median"], mix["mean_depth"]) == (2, 20)


SETTINGS = {
    "machine": "one core",
    "model": "smollm2-135m",
    "dtype": "float32",
    "kv_segments": "auto",
    "requests": {"single": 1, "prefill-heavy": 4},
}


@pytest.fixture
def record(tmp_path, capsys):
    """Two starts of a warm-up and a pair, the third cut off; ours takes half of the time."""
    print(json.dumps(SETTINGS))
    for start, full in ((1, 4.0), (2, 5.0), (3, 6.0)):
        for pair in (0, 1):
            tell(start, pair, {"single, ours, 10": 1.0 + pair, "single, cut, 10": 2.0 * pair})
            if start < 3:
                tell(start, pair, {"single, ours, 30": full, "single, cut, 30": full})
    path = tmp_path / "record"
    path.write_text(capsys.readouterr().out)
    return path


def test_what_was_told_is_read_again_without_the_warm_up(record):
    starts = starts_of(record, SETTINGS)
    shallow = {"single, ours, 10": 2.0, "single, cut, 10": 2.0}
    full = [{"single, ours, 30": took, "single, cut, 30": took} for took in (4.0, 5.0)]
    assert starts == [[shallow | full[0]], [shallow | full[1]], [shallow]]


def test_a_start_that_was_cut_off_counts_where_it_has_all_jobs(record):
    starts = starts_of(record, SETTINGS)
    deep = Times.of(starts, ["single, cut, 30", "single, ours, 30"], 1)
    assert deep.counts() == {"starts": 2, "pairs": 2} and deep["single, cut, 30"] == [4.0, 5.0]
    assert Times.of(starts, ["single, cut, 10"], 1).counts() == {"starts": 3, "pairs": 3}
    with pytest.raises(RecordError, match="no start has 2 pairs of single, cut, 10"):
        Times.of(starts, ["single, cut, 10"], 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"machine": "two cores"}, "two cores"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"requests": {"single": 2}}, "'single': 2"),
    ],
)
def test_a_record_of_something_else_is_refused(record, changes, named):
    with pytest.raises(RecordError, match=named):
        starts_of(record, SETTINGS | changes)


def test_workloads_that_only_one_has_may_differ(record):
    assert starts_of(record, SETTINGS | {"requests": {"single": 1, "decode-heavy": 64}})


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "notes").write_text("faster\n")
    with pytest.raises(RecordError, match="begins with 'faster"):
        starts_of(tmp_path / "notes", SETTINGS)
    with pytest.raises(RecordError, match="missing cannot be read: No such file"):
        starts_of(tmp_path / "missing", SETTINGS)


def test_figures_of_records_alone(record, monkeypatch, capsys, smollm2):
    arguments = ["--starts", "0", "--pairs", "1", "--workloads", "single", "--depths", "third"]
    arguments += ["--model", "smollm2-135m", "--dtype", "float32", "--records", str(record)]
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments, "--json"])
    main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["machine"] == "one core" and "startup_ratio" not in told
    assert told["uniform"]["single"]["10"]["speedup"]["median"] == 2.25
    assert told["full_depth_ratio"]["single"]["starts"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--starts", "0"], "--starts is 0; allowed: at least 1, or 0 with --records"),
        (["--starts", "-1", "--records", "x"], "--starts is -1; allowed: at least 1, or 0 with"),
        (["--pairs", "0"], "--pairs is 0; allowed: at least 1"),
        (["--starts", "0", "--records", "x"], "x cannot be read: No such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["throughput", *flags])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err
