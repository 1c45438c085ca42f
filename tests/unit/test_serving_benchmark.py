"""The parts of `benchmarks.serving` that need no server."""

import csv
import json
import math
from collections import Counter

import pytest

from benchmarks.serving_load import lists_of
from benchmarks.serving_report import (
    CUT,
    LISTS,
    OURS,
    SATURATION,
    VANILLA,
    Depths,
    Run,
    draw,
    headline,
    over_cut,
    summary,
    write_csv,
)
from benchmarks.serving_shapes import Asked, Shape, Texts
from benchmarks.serving_systems import Decided, decided_in
from raee_serve.errors import TaskError
from raee_serve.tasks.registry import get_task

pytestmark = pytest.mark.unit

SENTIMENT = get_task("demo_sentiment")
RATES = {VANILLA: 10.0, CUT: 20.0, OURS: 18.0}
FIRST_TOKEN_MS = {VANILLA: 30.0, CUT: 20.0, OURS: 36.0}

METRICS = """
# TYPE raee_exit_layer histogram
raee_exit_layer_sum{task="mr"} 30.0
raee_exit_layer_sum{task="-"} 18.0
raee_exit_layer_count{task="mr"} 4.0
# TYPE raee_decisions counter
raee_decisions_total{reason="retrieved",task="mr"} 3.0
raee_decisions_total{reason="far",task="mr"} 1.0
raee_decisions_total{reason="unmatched",task="-"} 1.0
# TYPE vllm:request_success counter
vllm:request_success_total{engine="0"} 5.0
"""


def result(system: str) -> dict[str, float]:
    """What vLLM's load generator says about a run."""
    times = {f"{p}_{name}_ms": FIRST_TOKEN_MS[system] for p in ("p50", "p99") for name in ("ttft",)}
    others = {
        f"{p}_{name}_ms": 40.0 * (name == "e2el")
        for p in ("p50", "p99")
        for name in ("tpot", "e2el")
    }
    rates = {"request_throughput": RATES[system], "output_throughput": RATES[system]}
    return {"completed": 8, **rates, **times, **others}


def runs(rounds: int = 2) -> list[Run]:
    """Three loads; raee-serve leaves at layer 9 of 18."""
    loads = {"0.2": 2.0, SATURATION: math.inf, LISTS: math.inf}
    made = {OURS: Decided(8, 72.0, Counter(retrieved=7, far=1))}
    return [
        Run.of(
            ("classification", r, load, name),
            rate,
            result(name),
            made.get(name, Decided()),
            16 if load == LISTS else 1,
        )
        for r in range(rounds)
        for load, rate in loads.items()
        for name in RATES
    ]


def test_a_cut_checkpoint_of_the_same_depth_is_the_measure():
    assert over_cut(10, 20, 20, Depths(18, 9, 9.0)) == pytest.approx(1)
    assert over_cut(10, 20, 25, Depths(18, 9, 9.0)) == pytest.approx(1.25)


def test_between_whole_layers_the_time_of_a_request_is_on_a_line():
    """18 layers take 100 ms and 8 take 50 ms, so 9.5 take 57.5 ms."""
    assert over_cut(10, 20, 1 / 0.0575, Depths(18, 8, 9.5)) == pytest.approx(1)
    assert over_cut(10, 20, 20, Depths(18, 8, 9.5)) > 1


def test_where_nothing_exits_early_vanilla_is_the_measure():
    assert over_cut(10, 11, 9, Depths(18, 17, 18.0)) == pytest.approx(0.9)


def test_lists_are_of_one_task_each():
    asked = [Asked(get_task(("cr", "sst2")[n % 2]), f"text {n}", 0) for n in range(10)]
    lists = lists_of(asked, 3)
    assert [len(own) for own in lists] == [3, 3, 2, 2]
    assert all(len({one.task.name for one in own}) == 1 for own in lists)
    assert {one.text for own in lists for one in own} == {one.text for one in asked}
    assert lists_of(asked, 1) == [[one] for one in asked]


def test_metrics_say_how_deep_and_why():
    decided = decided_in(METRICS)
    assert decided == Decided(5, 48.0, Counter(retrieved=3, far=1, unmatched=1))
    earlier = Decided(2, 20.0, Counter(retrieved=2))
    assert decided.since(earlier) == Decided(3, 28.0, Counter(retrieved=1, far=1, unmatched=1))
    assert decided_in("vllm:request_success_total 5.0\n") == Decided()


def test_a_summary_pairs_the_systems_of_each_round():
    answers = {
        name: [(Asked(SENTIMENT, "fine", 1), " great"), (Asked(SENTIMENT, "dull", 0), said)]
        for name, said in ((VANILLA, " great"), (CUT, " terrible"), (OURS, " terrible"))
    }
    said = summary(runs(), 18, 9, answers)
    assert said["mean_exit_layer"] == 9 and said["reasons"] == {"retrieved": 14, "far": 2}
    assert said["saturation_rps_ratio"]["median"] == pytest.approx(1.8)
    assert said["over_cut_checkpoint"]["median"] == pytest.approx(0.9)
    assert said["lists_ratio"]["median"] == pytest.approx(1.8)
    assert said["loads"][LISTS][OURS]["rps"] == 16 * RATES[OURS]
    assert said["ttft_p50_added_ms"]["median"] == pytest.approx(6)
    assert said["quality"][VANILLA] == {"mean": 0.5, "demo_sentiment": 0.5}
    assert "offered_rps" not in said["loads"][SATURATION][OURS]
    assert headline(said, [SENTIMENT]) == {
        "saturation_rps_ratio": 1.8,
        "over_cut_checkpoint": 0.9,
        "lists_ratio": 1.8,
        "accuracy": 1.0,
        "vanilla_accuracy": 0.5,
        "accuracy_is": "accuracy",
        "ttft_p50_added_ms": 6.0,
    }
    json.dumps(said, allow_nan=False)


def test_csv_and_picture(tmp_path):
    write_csv(runs(), tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert rows[-1]["reasons"] == "retrieved=7 far=1" and rows[-1]["mean_exit_layer"] == "9.0"
    draw(runs(), "a title", tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_texts_come_once_and_then_with_a_number():
    texts = Texts(Shape("classification", (SENTIMENT,), 1, 8), None, 150)
    asked = texts.take(100) + texts.take(30)
    assert len({one.text for one in asked}) == 130
    assert asked[60].text == f"{asked[0].text} 1" and asked[60].gold == asked[0].gold
    assert asked[120].text == f"{asked[0].text} 2"


def test_documents_are_cut_and_tasks_take_turns():
    notes = Shape(
        "summarisation", (get_task("demo_summary"), get_task("demo_chat_sentiment")), 8, 8
    )
    assert notes.is_chat
    asked = Texts(notes, None, 5).take(4)
    assert [one.task.name for one in asked] == ["demo_summary", "demo_chat_sentiment"] * 2
    assert len(asked[0].text.split()) == 5 < len(asked[1].text.split())


def test_completions_and_chats_are_not_one_shape():
    with pytest.raises(TaskError, match="demo_sentiment, demo_summary"):
        Shape("classification", (SENTIMENT, get_task("demo_summary")), 1, 8)
