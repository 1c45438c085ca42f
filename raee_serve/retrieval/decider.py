"""The exit that a prompt's nearest rows lead to: whose rows they are, the rule read on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import RaeeError
from raee_serve.exits.choice import PUBLISHED_K, Choice
from raee_serve.exits.neighbours import VOTERS, Array, evidence_weights, log_votes
from raee_serve.exits.rule import NO_EVIDENCE, expected, published, shallowest
from raee_serve.explanation import Explanation, Neighbour
from raee_serve.records import ExitDecision, ExitHead, Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.search import Neighbours
from raee_serve.retrieval.task_index import FAR_NEIGHBOURS, MIN_BOUND, TaskIndex, far_neighbours
from raee_serve.table.schema import TableMetadata
from raee_serve.tasks.task import Task

EXPLAINED = 12
"""Neighbours that an explanation names."""
ROUNDING = 1e-5
"""What sums of float32 qualities may be off by, as a share."""


@dataclass(frozen=True)
class _Reading:
    """What is read for one prompt.

    task: whose row is nearest. is_plain: whether the paper's rule decides, on what the plain head
        says. rows: [n] of its rows that were found, nearest first, by their
    place in the index; similarities: [n] cosine. vector: [dimension] of the prompt.
    """

    task: str
    index: TaskIndex
    choice: Choice
    is_plain: bool
    rows: NDArray[np.int64]
    similarities: NDArray[np.float32]
    vector: NDArray[np.float32]

    @cached_property
    def log_vote(self) -> Array:
        """[num_labels] of the VOTERS nearest."""
        labels = self.index.labels[self.rows[:VOTERS]]
        return log_votes(self.similarities[:VOTERS], labels, self.index.counts)

    @cached_property
    def certainty(self) -> float | None:
        """None where there is no fit, and with it no front end's own answer."""
        fit = self.index.fit
        return None if fit is None else fit.certainty(self.vector, self.log_vote)

    @cached_property
    def expected(self) -> Array:
        """[heads, num_layers] how well each exit is expected to do."""
        near, close = self.rows[: self.choice.k], self.similarities[: self.choice.k]
        weights = evidence_weights(close)
        if self.certainty is not None:
            own = np.array(self.certainty)
            weights = evidence_weights(close, self.index.certainties[near], own)
        return expected(self.index.evidence[near], weights)


class ExitDecider:
    """Decides exits from what a table's rows hold beside their vectors, all of it in memory."""

    def __init__(
        self,
        metadata: TableMetadata,
        indexes: Mapping[str, TaskIndex],
        exit_points: tuple[int, ...] = (),
    ) -> None:
        """indexes: by task; rows are numbered through, task after task.

        exit_points: the layers at which exits are decided, full depth among them; none for any.
        """
        self._indexes = indexes
        self._exit_points = exit_points
        self._names = tuple(indexes)
        self._ends = np.cumsum([len(index) for index in indexes.values()])
        self.choices = {name: index.choice for name, index in indexes.items()}
        self.rows_by_task = {name: len(index) for name, index in indexes.items()}
        self.num_layers = metadata.backbone.num_layers
        self.tasks: Mapping[str, Task] = {name: metadata.tasks[name].task for name in indexes}

    def check(self, lookup: Lookup) -> None:
        """Raises RaeeError for k < 1, a budget outside (0, 1], an unknown task."""
        unknown = [name for name in lookup.candidates if name not in self.tasks]
        if unknown or not lookup.candidates:
            raise RaeeError(
                f"tasks {lookup.candidates} must be one or more of this table's: "
                f"{', '.join(self._names)}"
            )
        for name in lookup.candidates:
            self._choice_for(lookup, name)

    def never_exits(self, lookup: Lookup) -> bool:
        """Whether no rows, were they the nearest, could lead to an exit before full depth."""
        return lookup.exit_layer is None and all(
            self._choice_for(lookup, name).budget > self._indexes[name].most_kept * (1 + ROUNDING)
            for name in lookup.candidates
        )

    def no_exit(self, lookup: Lookup) -> ExitDecision:
        """For one that `never_exits`, without rows."""
        return ExitDecision.full(self.num_layers, Reason.NO_EXIT, task=lookup.task)

    def most_neighbours(self, lookup: Lookup) -> int:
        """How many it may need: k depends on which task the nearest row is of."""
        most = max(self._choice_for(lookup, name).k for name in lookup.candidates)
        return max(most, FAR_NEIGHBOURS, VOTERS)

    def decide(
        self, lookup: Lookup, found: Neighbours, vector: NDArray[np.float32]
    ) -> ExitDecision:
        """Full depth for the reasons NO_EXIT (where the look-up explains), FAR and NO_EVIDENCE.

        found: at least `most_neighbours` of the candidates' rows, or all that they have; vector:
        [dimension] of the prompt.
        """
        reading = self._reading(lookup, found, vector)
        about: dict[str, Any] = {"task": reading.task, "distance": float(found.distances[0])}
        if lookup.explain:
            about["explanation"] = self._explanation(reading, lookup.min_layer)
            if self.never_exits(lookup):  # others of these are not looked up
                return ExitDecision.full(self.num_layers, Reason.NO_EXIT, **about)
        if lookup.exit_layer is not None:
            own: ExitHead = "plain" if reading.index.fit is None else "probe"
            return self._exit(reading, lookup.exit_layer, own, Reason.OVERRIDE, about)
        if self._is_far(reading, lookup.candidates, found):
            return self._fall_back(reading, lookup, Reason.FAR, about)
        layer, head, wanted = self._chosen(reading, lookup.min_layer - 1)
        if layer == NO_EVIDENCE:
            return self._fall_back(reading, lookup, Reason.NO_EVIDENCE, about)
        if wanted != layer:
            about["decided_layer"] = wanted
        return self._exit(reading, layer, head, Reason.RETRIEVED, about)

    def _reading(self, lookup: Lookup, found: Neighbours, vector: NDArray[np.float32]) -> _Reading:
        owner = int(np.searchsorted(self._ends, found.rows[0], side="right"))
        name = self._names[owner]
        index = self._indexes[name]
        first = int(self._ends[owner]) - len(index)
        own = (found.rows >= first) & (found.rows < self._ends[owner])
        return _Reading(
            name,
            index,
            self._choice_for(lookup, name),
            self._is_plain(lookup, name),
            found.rows[own] - first,
            1 - found.distances[own],
            vector,
        )

    def _choice_for(self, lookup: Lookup, name: str) -> Choice:
        stored = self.choices[name]
        k = PUBLISHED_K if self._is_plain(lookup, name) else stored.k
        return replace(
            stored,
            k=k if lookup.k is None else lookup.k,
            budget=stored.budget if lookup.budget is None else lookup.budget,
        )

    def _is_plain(self, lookup: Lookup, name: str) -> bool:
        heads = self._indexes[name].heads
        return heads == ("plain",) or (lookup.head == "plain" and heads == ("probe",))

    def _chosen(self, reading: _Reading, skipped: int) -> tuple[int, ExitHead, int]:
        """Exit layer at an exit point, head, and the layer that any point allowed would give.

        skipped: layers at the beginning after which nothing may leave.
        """
        if reading.is_plain:
            wanted = self._published(reading)
            if wanted != NO_EVIDENCE:
                wanted = max(wanted, skipped + 1)
            points = [point for point in self._exit_points if point >= wanted > NO_EVIDENCE]
            return (points[0] if points else wanted), "plain", wanted
        scores, budget = reading.expected[:, skipped:], reading.choice.budget
        layer, head = (int(part) for part in shallowest(scores, budget))
        if layer == NO_EVIDENCE:
            return NO_EVIDENCE, "plain", NO_EVIDENCE
        wanted = skipped + layer
        if self._exit_points and wanted not in self._exit_points:
            points = [point - skipped for point in self._exit_points if point > skipped]
            layer, head = (int(part) for part in shallowest(scores, budget, points))
        return skipped + layer, reading.index.heads[head], wanted

    def _published(self, reading: _Reading) -> int:
        k, probs = reading.choice.k, reading.index.plain_probs
        if probs is None:
            return NO_EVIDENCE
        return int(published(probs[reading.rows[:k]], 1 - reading.similarities[:k]))

    def _fall_back(
        self, reading: _Reading, lookup: Lookup, reason: Reason, about: Mapping[str, Any]
    ) -> ExitDecision:
        """Full depth; by the last layer's probe where the prompt is known to be of a label task."""
        if reading.index.fit is None or reading.is_plain or lookup.task is None:
            return ExitDecision.full(self.num_layers, reason, **about)
        return self._exit(reading, self.num_layers, "probe", reason, about)

    def _exit(
        self,
        reading: _Reading,
        layer: int,
        head: ExitHead,
        reason: Reason,
        about: Mapping[str, Any],
    ) -> ExitDecision:
        if head == "shortcut" and layer == self.num_layers:
            head = "plain"
        if head != "probe":
            return ExitDecision(layer, self.num_layers, reason, head=head, **about)
        fit = reading.index.fit
        assert fit is not None, reading.task
        layer = next(probed for probed in fit.layers if probed >= layer)
        scores = fit.front_scores(layer, reading.vector, reading.log_vote)
        return ExitDecision(
            layer,
            self.num_layers,
            reason,
            head="probe",
            probe=f"{reading.task}/{layer}",
            label_scores=tuple(scores.tolist()),
            **about,
        )

    def _is_far(self, reading: _Reading, searched: tuple[str, ...], found: Neighbours) -> bool:
        """Whether the nearest rows say nothing of the prompt; see `FAR_NEIGHBOURS`."""
        judged = far_neighbours(sum(self.rows_by_task[name] for name in searched))
        close = found.distances[:judged].mean()
        return bool(found.distances[0] > MIN_BOUND and close > reading.index.distance_bound)

    def _explanation(self, reading: _Reading, min_layer: int) -> Explanation:
        index, labels = reading.index, self.tasks[reading.task].labels
        near = reading.rows[:EXPLAINED]
        told = tuple(
            Neighbour(index.ids[row], 1 - similarity, labels[index.labels[row]] if labels else None)
            for row, similarity in zip(near, reading.similarities.tolist(), strict=False)
        )
        promised = reading.expected[:, min_layer - 1 :].tolist()
        return Explanation(
            told,
            dict(zip(index.heads, promised, strict=True)),
            reading.choice,
            index.distance_bound,
            min_layer,
            reading.certainty,
        )
