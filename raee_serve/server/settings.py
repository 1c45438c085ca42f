"""How a server chooses depths, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from raee_serve.errors import RaeeError
from raee_serve.records import ExitHead
from raee_serve.retrieval.resources import BATCH_SIZE, DEFAULT_BACKEND, ROWS_IN_MEMORY_MB
from raee_serve.server.options import MAX_K

LOOKUP_TIMEOUT_MS = 1000.0
"""Many times what look-ups of a burst wait for each other: full depth, which is what a late one
gets, costs the others of a busy CPU more than waiting does."""


@dataclass(frozen=True, slots=True)
class DepthSettings:
    """How depths are chosen: by a table, or one fixed depth for all.

    table: URI of the exit table; None with `exit_layer`.
    exit_layer: a number of layers or "full", as typed; None with `table`.
    watch_table: seconds between looks at whether the table has changed; None for never.
    k, head, budget, encoder, max_distance: None leaves them to the table.
    shortcuts_file: exit shortcuts; None for those beside the table, if there are any.
    exit_points: the layers at which exits are decided; none for any.
    encoder_backend, rows_in_memory_mb: see `ExitRetriever.open`.
    """

    table: str | None = None
    exit_layer: str | None = None
    encoder: str | None = None
    k: int | None = None
    head: ExitHead | None = None
    budget: float | None = None
    max_distance: float | None = None
    lookup_timeout_ms: float = LOOKUP_TIMEOUT_MS
    watch_table: float | None = None
    encoder_backend: str = DEFAULT_BACKEND
    rows_in_memory_mb: float = ROWS_IN_MEMORY_MB
    shortcuts_file: str | None = None
    exit_points: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.table is None) == (self.exit_layer is None):
            raise RaeeError(
                "give either --table DIR, for depths retrieved from an exit table, "
                "or --exit-layer N|full, for one depth for all"
            )
        if self.watch_table is not None:
            if self.table is None:
                raise RaeeError("--watch-table needs --table")
            if not 0.1 <= self.watch_table <= 86400:
                raise RaeeError(
                    f"--watch-table is {self.watch_table:g}; allowed: 0.1..86400 seconds"
                )
        if self.head not in (None, "plain", "probe"):
            raise RaeeError(f"--head is {self.head!r}; allowed: plain, probe")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise RaeeError(f"--budget is {self.budget}; allowed: above 0, at most 1")
        if self.lookup_timeout_ms <= 0:
            raise RaeeError(
                f"--lookup-timeout-ms is {self.lookup_timeout_ms}; allowed: more than 0"
            )
        if self.max_distance is not None and not 0 <= self.max_distance <= 2:
            raise RaeeError(
                f"--max-distance is {self.max_distance}; allowed: 0..2, as cosine distances are"
            )
        if self.encoder_backend not in BATCH_SIZE:
            raise RaeeError(
                f"--encoder-backend is {self.encoder_backend!r}; allowed: {', '.join(BATCH_SIZE)}"
            )
        if not self.rows_in_memory_mb >= 0:
            raise RaeeError(
                f"--rows-in-memory is {self.rows_in_memory_mb:g}; allowed: 0 or more, in MB"
            )
        if self.k is not None and not 1 <= self.k <= MAX_K:
            raise RaeeError(f"--k is {self.k}; allowed: 1..{MAX_K}")
