"""Exit points: the layers after which requests may leave steps that run as CUDA graphs.

Layers between two of them are one *segment*, captured as one graph for each batch size. An exit in
between is still exact, but its steps run without graphs; so exits are decided at the points.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from raee_serve.errors import RaeeError

MAX_POINTS = 8
"""How many `choose_points` takes at most. Each costs a mixed step one launch and two row copies."""


def checked_points(points: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """`points` in order, with full depth. Raises RaeeError for one outside 1..num_layers."""
    wrong = [p for p in points if not 1 <= p <= num_layers]
    if wrong or not points:
        raise RaeeError(f"exit points are {list(points)}; allowed: layers 1..{num_layers}")
    return tuple(sorted({*points, num_layers}))


def even_points(num_layers: int, count: int = MAX_POINTS) -> tuple[int, ...]:
    """Up to `count` points at equal distances, where nothing is known of the exits to come."""
    count = min(count, num_layers)
    return tuple(sorted({round(num_layers * (i + 1) / count) for i in range(count)}))


def choose_points(
    exits: Mapping[int, float], num_layers: int, count: int = MAX_POINTS
) -> tuple[int, ...]:
    """The up to `count` points, full depth among them, at which requests run the fewest layers
    beyond the exits decided for them.

    exits: weight of each exit layer (1..num_layers), at least 0, in any unit.
    Exact, by dynamic programming over the layers. Raises `ValueError` for a layer or weight out of
    range, or a count below 1.
    """
    if count < 1:
        raise ValueError(f"{count} exit points; allowed: at least 1")
    if any(not 1 <= layer <= num_layers or weight < 0 for layer, weight in exits.items()):
        raise ValueError(f"exits are {dict(exits)}; allowed: layers 1..{num_layers}, weights >= 0")
    weights = [exits.get(layer, 0.0) for layer in range(num_layers + 1)]
    mass = list(accumulate(weights))
    moment = list(accumulate(layer * weight for layer, weight in enumerate(weights)))

    def extra(before: int, point: int) -> float:
        """Layers run in excess by exits in before + 1 .. point, which leave at `point`."""
        return point * (mass[point] - mass[before]) - (moment[point] - moment[before])

    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(min(count, num_layers)):
        reached = dict(best)
        for point in range(1, num_layers + 1):
            ways = (
                (cost + extra(before, point), (*points, point))
                for before, (cost, points) in best.items()
                if before < point
            )
            shortest = min(ways, key=lambda way: (way[0], len(way[1])))
            if point not in reached or shortest[0] < reached[point][0]:
                reached[point] = shortest
        best = reached
    return best[num_layers][1]


def rounded_up(layer: int, points: Sequence[int]) -> int:
    """The first point at or after `layer`; points as `checked_points` gives them."""
    return points[bisect_left(points, layer)]


def extra_layers(exits: Mapping[int, float], points: Sequence[int]) -> float:
    """Layers that a request runs on average beyond its exit when it leaves at the next point."""
    total = sum(exits.values())
    extra = sum(weight * (rounded_up(layer, points) - layer) for layer, weight in exits.items())
    return extra / total if total else 0.0


def segments_between(points: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(first layer, end layer), 0-based, of the layers that lead up to each point."""
    return tuple(pairwise((0, *points)))
