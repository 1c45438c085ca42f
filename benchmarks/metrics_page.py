"""What a server's `/metrics` say."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

TIMEOUT_S = 60


def total(url: str, name: str, **labels: str) -> float:
    """Sum of the samples of that name that have these labels, and maybe more; 0 if there are none.

    url: the server's, without a path. Raises `OSError` if it does not answer.
    """
    return sum(
        sample.value
        for sample in samples(page(url))
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def page(url: str) -> str:
    """The text that Prometheus is given. Raises `OSError`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as answer:
        text: str = answer.read().decode()
    return text


def samples(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        yield from family.samples
