"""matplotlib, where it is installed."""

from __future__ import annotations

from typing import Any

from raee_serve.errors import RaeeError


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files. Raises RaeeError without matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise RaeeError("drawing needs matplotlib: install raee-serve[plot]") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
