"""The exit that a prompt's nearest rows lead to: whose rows they are, the rule read on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from raee_serve.errors import RaeeError
from raee_serve.explanation import Explanation, Neighbour
from raee_serve.records import ExitDecision, ExitHead, Reason
from raee_serve.retrieval.aggregate import (
    QUALITY,
    QUALITY_RULE,
    Rule,
    decide,
    exit_scores,
    rule_named,
    share_of,
)
from raee_serve.retrieval.heads import HeadName, label_counts, log_votes
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.search import Neighbours
from raee_serve.retrieval.task_index import (
    FAR_NEIGHBOURS,
    MIN_BOUND,
    TaskIndex,
    far_neighbours,
    read_by,
)
from raee_serve.table.evidence import most_kept
from raee_serve.table.schema import RuleChoice, TableMetadata
from raee_serve.table.task import Task
from raee_serve.table.tasks import TASKS

ROUNDING = 1e-5
"""What sums of float32 qualities may be off by, as a share."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a rule reads for one prompt.

    owner: position of the task whose row is nearest. near: the k nearest rows. evidence:
    [k, len(heads), num_layers - skipped], without the first `skipped` layers.
    """

    owner: int
    choice: RuleChoice
    rule: Rule
    heads: tuple[str, ...]
    near: Neighbours
    evidence: NDArray
    skipped: int


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
        self._exit_points = exit_points
        self._ids = [row_id for index in indexes.values() for row_id in index.ids]
        self._evidence = np.concatenate([index.evidence for index in indexes.values()])
        self._labels = np.concatenate([index.labels for index in indexes.values()])
        self.choices = {name: index.choice for name, index in indexes.items()}
        self._heads = [index.heads for index in indexes.values()]
        self._names = tuple(indexes)
        by_exit = list(read_by(QUALITY_RULE, biases_labels=False).values())
        self._most_kept = {
            name: most_kept(index.evidence[:, by_exit])
            for name, index in indexes.items()
            if not index.heads
        }
        self._bounds = [index.distance_bound for index in indexes.values()]
        self._ends = np.cumsum([len(index) for index in indexes.values()])
        self._label_counts = {
            name: label_counts(index.labels, len(metadata.tasks[name].label_words))
            for name, index in indexes.items()
        }
        self.rows_by_task = {name: len(index) for name, index in indexes.items()}
        self.num_layers = metadata.backbone.num_layers
        self.tasks: Mapping[str, Task] = {name: TASKS[name] for name in indexes}

    def check(self, lookup: Lookup) -> None:
        """Raises RaeeError for k < 1, a quality outside (0, 1], an unknown rule or task."""
        if lookup.k is not None and lookup.k < 1:
            raise RaeeError(f"k = {lookup.k} is not allowed, it must be at least 1")
        if lookup.rule is not None:
            rule_named(lookup.rule)
        if lookup.quality is not None and not 0 < lookup.quality <= 1:
            raise RaeeError(f"quality {lookup.quality} is not within (0, 1]")
        unknown = [name for name in lookup.candidates if name not in self.tasks]
        if unknown or not lookup.candidates:
            raise RaeeError(
                f"tasks {lookup.candidates} must be one or more of this table's: "
                f"{', '.join(self._names)}"
            )

    def never_exits(self, lookup: Lookup) -> bool:
        """Whether no rows, were they the nearest, could lead to an exit before full depth."""
        choices = {name: self._choice_for(lookup, name) for name in lookup.candidates}
        return all(
            choice.rule == QUALITY and choice.quality > self._most_kept[name] * (1 + ROUNDING)
            for name, choice in choices.items()
        )

    def no_exit(self, lookup: Lookup) -> ExitDecision:
        """For one that `never_exits`, without rows."""
        return ExitDecision.full(self.num_layers, Reason.NO_EXIT, task=lookup.task)

    def most_neighbours(self, lookup: Lookup) -> int:
        """How many it may need: k depends on which task the nearest row is of."""
        most = max(self._choice_for(lookup, name).k for name in lookup.candidates)
        return max(most, FAR_NEIGHBOURS)

    def rule_for(self, task: str, asked: str | None) -> str:
        """The rule that chooses a task's exits where that one, or None, is asked for."""
        own = self.choices[task].rule
        if asked is None or (asked == QUALITY and self.tasks[task].kind == "labels"):
            return own
        return asked

    def decide(self, lookup: Lookup, found: Neighbours) -> ExitDecision:
        """Full depth for the reasons NO_EXIT (where the look-up explains), FAR and NO_EVIDENCE.

        found: at least `most_neighbours` of the candidates' rows, or all that they have.
        """
        reading = self._reading(lookup, found)
        task, distance = self._names[reading.owner], float(reading.near.distances[0])
        about: dict[str, Any] = {"task": task, "distance": distance}
        if lookup.explain:
            about["explanation"] = self._explanation(reading)
            if self.never_exits(lookup):  # others of these are not looked up
                return ExitDecision.full(self.num_layers, Reason.NO_EXIT, **about)
        if self._is_far(reading.owner, lookup.candidates, found):
            return ExitDecision.full(self.num_layers, Reason.FAR, **about)
        chosen = self._chosen(reading)
        if chosen is None:
            return ExitDecision.full(self.num_layers, Reason.NO_EVIDENCE, **about)
        layer, head, wanted = chosen
        if wanted != layer:
            about["decided_layer"] = wanted
        if reading.rule is QUALITY_RULE:
            about["exit_head"] = cast(ExitHead, head)
        else:
            about["head"] = head
            about["label_bias"] = self._label_bias(head, layer, reading, lookup.candidates)
        return ExitDecision(layer, self.num_layers, Reason.RETRIEVED, **about)

    def _reading(self, lookup: Lookup, found: Neighbours) -> _Reading:
        owner = int(np.searchsorted(self._ends, found.rows[0], side="right"))
        choice = self._choice_for(lookup, self._names[owner])
        rule = rule_named(choice.rule)
        places = read_by(rule, biases_labels=bool(self._heads[owner]))
        near = Neighbours(found.rows[: choice.k], found.distances[: choice.k])
        skipped = lookup.min_layer - 1
        evidence = self._evidence[near.rows][:, list(places.values()), skipped:]
        return _Reading(owner, choice, rule, tuple(places), near, evidence, skipped)

    def _choice_for(self, lookup: Lookup, name: str) -> RuleChoice:
        """A task's choice with what the look-up asks for; another rule brings its own k."""
        stored = self.choices[name]
        rule = self.rule_for(name, lookup.rule)
        k = stored.k if rule == stored.rule else rule_named(rule).k
        quality = stored.quality if lookup.quality is None else lookup.quality
        return replace(stored, rule=rule, k=lookup.k or k, quality=quality)

    def _chosen(self, reading: _Reading) -> tuple[int, str, int] | None:
        """Exit layer at an exit point, head, and the layer that any point allowed would give."""
        rule, evidence, skipped = reading.rule, reading.evidence, reading.skipped
        distances = reading.near.distances
        share = share_of(rule, reading.choice.fraction, reading.choice.quality)
        chosen = decide(rule, evidence, distances, fraction=share)
        if chosen is None:
            return None
        wanted = skipped + chosen[0]
        if self._exit_points and wanted not in self._exit_points:
            points = [point - skipped for point in self._exit_points if point > skipped]
            chosen = decide(rule, evidence, distances, fraction=share, points=points)
            assert chosen is not None
        return skipped + chosen[0], reading.heads[chosen[1]], wanted

    def _is_far(self, owner: int, searched: tuple[str, ...], found: Neighbours) -> bool:
        """Whether the nearest rows say nothing of the prompt; see `FAR_NEIGHBOURS`."""
        judged = far_neighbours(sum(self.rows_by_task[name] for name in searched))
        close = found.distances[:judged].mean()
        return bool(found.distances[0] > MIN_BOUND and close > self._bounds[owner])

    def _explanation(self, reading: _Reading) -> Explanation:
        near = reading.near
        scores = exit_scores(reading.rule, reading.evidence, near.distances).tolist()
        # All tasks that are searched share their label words.
        words = self.tasks[self._names[reading.owner]].label_words
        told = tuple(
            Neighbour(self._ids[row], distance, words[self._labels[row]] if words else None)
            for row, distance in zip(near.rows, near.distances.tolist(), strict=True)
        )
        return Explanation(
            told,
            dict(zip(reading.heads, scores, strict=True)),
            reading.choice,
            self._bounds[reading.owner],
            reading.skipped + 1,
        )

    def _label_bias(
        self, name: str, layer: int, reading: _Reading, searched: tuple[str, ...]
    ) -> tuple[float, ...]:
        """What a head adds to the label words' logits, as it was made for the nearest row's task.

        searched: the tasks that the rows are nearest of, whose label words are the same.
        """
        head = self._heads[reading.owner].get(cast(HeadName, name))
        if head is None:
            return ()
        counts = np.sum([self._label_counts[task] for task in searched], axis=0)
        near = reading.near
        votes = log_votes(1 - near.distances.astype(np.float64), self._labels[near.rows], counts)
        return tuple(head.label_bias(layer, votes).tolist())
