"""Uniform depths by name, mixes of depths, and what a mix would ideally take."""

import random
from collections.abc import Sequence
from itertools import pairwise

MIXES = ("six-depths", "half-shallow")
"""Uniform random over six depths; half at a third of the layers, half at full depth."""

DEPTHS = {"third": 1 / 3, "half": 1 / 2, "two-thirds": 2 / 3, "full": 1.0}
"""Names of uniform depths, as shares of the layers."""


def depth_named(name: str, num_layers: int) -> int:
    """A number of layers, or one of DEPTHS. Raises `ValueError` for others."""
    if name in DEPTHS:
        return round(DEPTHS[name] * num_layers)
    if name.isdecimal() and 1 <= int(name) <= num_layers:
        return int(name)
    raise ValueError(f"depth {name!r}; allowed: 1..{num_layers}, {', '.join(DEPTHS)}")


def six_depths(num_layers: int) -> list[int]:
    """Spread evenly, full depth the last."""
    return [max(1, round(num_layers * i / 6)) for i in range(1, 7)]


def mixes(num_layers: int, num_requests: int) -> dict[str, list[int]]:
    """Exit layers of each mix; seeded, the same in every run."""
    six = six_depths(num_layers)
    rng = random.Random(0)
    shallow = max(1, round(num_layers / 3))
    half = [shallow, num_layers] * (num_requests // 2)
    return dict(zip(MIXES, ([rng.choice(six) for _ in range(num_requests)], half), strict=True))


def ideal_parts(exits: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What a batch of mixed depths would ideally take, in times of vanilla on cut checkpoints.

    With depths d1 < .. < dm and n_i requests at d_i or deeper, the ideal is T(d1, n1) + sum over
    i > 1 of T(d_i, n_i) - T(d_{i-1}, n_i), where T(d, n) is the time of n requests on the
    checkpoint cut to d layers. Returns the (d, n) that are added and those that are taken away.
    """
    depths = sorted(set(exits))
    alive = {d: sum(e >= d for e in exits) for d in depths}
    return [(d, alive[d]) for d in depths], [(d, alive[deeper]) for d, deeper in pairwise(depths)]
