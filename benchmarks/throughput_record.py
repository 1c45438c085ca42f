"""What a run of `benchmarks.throughput` has printed, read again: its starts count in another run.

A start takes minutes and an interval wants many, so they need not be of one run, and what a run
that was cut off has told is not lost. That both ran the same code is up to whoever joins them.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Round = dict[str, float]
"""Seconds by name of job."""

TOLD = re.compile(r"start (\d+), pair (\d+): (.+)")
JOB = re.compile(r"(.+?): ([\d.]+) s(?:; |$)")


class RecordError(RuntimeError):
    """A file that is no record, or one of something else; the message names it."""


def tell(start: int, pair: int, seconds: Mapping[str, float]) -> None:
    """A line about jobs that ran side by side; pair 0 warms up."""
    said = "; ".join(f"{name}: {took:.3f} s" for name, took in seconds.items())
    print(f"start {start}, pair {pair}: {said}", flush=True)


def settings_of(path: Path) -> dict[str, Any]:
    """What was measured, and on what. Raises `RecordError`."""
    try:
        with path.open() as lines:
            first = next(lines, "")
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    try:
        settings = json.loads(first)
        dict(settings["requests"])
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise RecordError(f"{path} begins with {first[:80]!r}, not with its settings") from error
    return dict(settings)


def starts_of(path: Path, settings: Mapping[str, Any]) -> list[list[Round]]:
    """By start the rounds that count; some may lack jobs.

    Raises `RecordError` where the record has other settings, or another number of requests of a
    workload that both have.
    """
    own = settings_of(path)
    of_both = own["requests"].keys() & settings["requests"].keys()
    compared = [
        {**each, "requests": {name: each["requests"][name] for name in sorted(of_both)}}
        for each in (own, settings)
    ]
    if compared[0] != compared[1]:
        raise RecordError(f"{path} is of {compared[0]}; asked for {compared[1]}")
    starts: dict[int, dict[int, Round]] = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text().splitlines():
        told = TOLD.fullmatch(line)
        if told and int(told[2]):
            seconds = {name: float(took) for name, took in JOB.findall(told[3])}
            starts[int(told[1])][int(told[2])] |= seconds
    return [list(rounds.values()) for rounds in starts.values()]


def complete(
    starts: Sequence[Sequence[Round]], names: Sequence[str], pairs: int
) -> list[list[Round]]:
    """Of each start the first `pairs` rounds that have all these jobs, if it has so many."""
    whole = [[took for took in rounds if took.keys() >= set(names)] for rounds in starts]
    return [rounds[:pairs] for rounds in whole if len(rounds) >= pairs]
