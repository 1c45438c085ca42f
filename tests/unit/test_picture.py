"""Runs of `benchmarks.throughput` as one table and one picture."""

import copy

import pytest

from benchmarks.picture import as_markdown, draw, together

pytestmark = pytest.mark.unit


def ratio(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 0.1, "high": median + 0.1}


def figures(speedup: float, efficiency: float, **more: float) -> dict:
    return {"speedup": ratio(speedup), "efficiency": ratio(efficiency), **more}


RUN = {
    "model": "m",
    "dtype": "float32",
    "machine": "here",
    "num_layers": 30,
    "full_depth_ratio": {"single": ratio(1.0)},
    "uniform": {"single": {"10": figures(2.5, 0.98), "5": figures(3.5, 1.02)}},
    "mixed": {},
}
OTHER = {
    **copy.deepcopy(RUN),
    "full_depth_ratio": {},
    "uniform": {"decode-heavy": {}},
    "mixed": {"decode-heavy": {"six-depths": figures(1.5, 0.96, mean_depth=17.5)}},
}


def test_each_workload_has_its_column_and_each_depth_its_row():
    assert as_markdown(together([RUN, OTHER])).splitlines() == [
        "| m | single | decode-heavy |",
        "| --- | --- | --- |",
        "| full depth | 1.000 [0.900, 1.100] |  |",
        "| 5 of 30 layers | 3.50; 1.020 [0.920, 1.120] |  |",
        "| 10 of 30 layers | 2.50; 0.980 [0.880, 1.080] |  |",
        "| six-depths |  | 1.50; 0.960 [0.860, 1.060] |",
    ]


def test_runs_of_two_models_are_not_one():
    with pytest.raises(ValueError, match="model is 'm' and 'n'"):
        together([RUN, {**RUN, "model": "n"}])


def test_the_picture(tmp_path):
    draw(together([RUN, OTHER]), "single", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
