"""What retrieved exits and their peers give on running servers, each beside vanilla vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raee_serve.cut import checkpoint_of
from raee_serve.evaluation.baselines import Answers
from raee_serve.evaluation.suite import summarised
from raee_serve.evaluation.suite.dropping import LayerDropping
from raee_serve.evaluation.suite.findings import Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.quantizing import int8_checkpoint
from raee_serve.evaluation.suite.scores import averaged
from raee_serve.evaluation.suite.serving import (
    CONCURRENCY,
    System,
    Timed,
    Way,
    in_turns,
    predicted,
    raee_system,
    speed,
    vanilla_system,
)
from raee_serve.evaluation.suite.summarised import Documents
from raee_serve.retrieval.heads import calibrated
from raee_serve.table.task import Task

PROMPTS = 200
"""Of a task, at most."""
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
NOTES = (
    f"Rows with a speed are answers of servers to the same prompts, {CONCURRENCY} under way at "
    "once; speed: requests/s over those of vanilla vLLM, which is asked the same in turns with "
    "each; latency ms: median of prompts asked one at a time. Look-ups are included.",
    "All but the retrieved exits and the n-gram drafts are calibrated on the table's rows, by "
    "`logit_bias`, which vLLM refuses beside drafts; int8 weights with full depth's biases. An "
    "answer of one label word leaves n-gram drafts nothing to draft.",
    "raee-serve at full depth: what it gains without exits, as by logits of the label words alone.",
    "static truncation, layers dropped: as many layers as retrieved exits run on average, rounded.",
)
CPU_ONLY = "Speed was not measured: two servers at once would each want the GPU's memory."

Biases = Mapping[str, NDArray[np.float64]]
"""By label-word task: [num_labels], what its scores are freed of."""
Prompts = Mapping[Task, Sequence[str]]
Timings = Mapping[str, Timed]
"""By task."""
Settings = Callable[[Task], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Peer:
    """One system beside vanilla vLLM.

    layers: that it runs, None where its answers say it. prompts: those it is asked; settings: of
    every request about a task. raee: see `Way`.
    """

    name: str
    layers: int | None
    start: Callable[[], AbstractContextManager[System]]
    prompts: Prompts
    settings: Settings
    raee: Mapping[str, Any] = field(default_factory=dict)


def measured(material: Material, dropping: LayerDropping) -> tuple[list[Row], Sequence[str]]:
    """A row of each system for label words and one for summaries, and what is to be said of them;
    nothing where the material has neither to be served. Raises ServerStartError."""
    study = _Study(material, dropping)
    if not study.prompts:
        return [], ()
    return ([], (CPU_ONLY,)) if torch.cuda.is_available() else (study.rows(), NOTES)


class _Study:
    def __init__(self, material: Material, dropping: LayerDropping) -> None:
        self._material = material
        self._dropping = dropping
        self._documents = Documents.of(material)
        self._folder = Path(mkdtemp(dir=material.source.scratch))
        self._num_layers = material.backbone.num_layers
        served = min(material.source.served, PROMPTS)
        labels = {task: material.asked(task).texts[:served] for task in material.tasks}
        self.prompts: Prompts = {**(labels if served else {}), **self._documents.texts}

    def rows(self) -> list[Row]:
        """Vanilla vLLM's, then each peer's."""
        source, checkpoint = self._material.source, self._material.checkpoint
        at_full_depth = self._biases_at(self._num_layers)
        with vanilla_system(checkpoint, source.model) as vanilla:
            base = Way(vanilla, {}, self._settings(at_full_depth))
            retrieved = Peer("retrieved exits", None, self._raee, self.prompts, summarised.settings)
            theirs, ours = self._pair(base, retrieved)
            rows = self._lines("vanilla vLLM", self._num_layers, theirs, theirs)
            rows += self._lines(retrieved.name, None, ours, theirs)
            for peer in (*self._shorter(ours), *self._whole(at_full_depth)):
                theirs, own = self._pair(base, peer)
                rows += self._lines(peer.name, peer.layers, own, theirs)
        return rows

    def _pair(self, base: Way, peer: Peer) -> tuple[Timings, Timings]:
        print(f"raee-serve: peers: {peer.name}", flush=True)
        with peer.start() as system:
            theirs, own = in_turns([base, Way(system, peer.raee, peer.settings)], peer.prompts)
        return theirs, own

    def _shorter(self, retrieved: Timings) -> Iterator[Peer]:
        """Of as many layers as the retrieved exits of the same kind of task."""
        for kind in ("labels", "free-text"):
            prompts = {task: own for task, own in self.prompts.items() if task.kind == kind}
            if not prompts:
                continue
            depth = float(np.mean([retrieved[task.name].depth for task in prompts]))
            n = min(max(round(depth * self._num_layers), 1), self._num_layers - 1)
            biases: Biases = {}
            if kind == "labels":
                biases = self._dropping.biases(self._num_layers - n)
            for name, layers, own in (
                ("static truncation", list(range(1, n + 1)), self._biases_at(n)),
                ("layers dropped", self._dropping.kept(n), biases),
            ):
                yield self._vanilla(name, layers, prompts, self._settings(own))

    def _whole(self, at_full_depth: Biases) -> Iterator[Peer]:
        """Of all layers."""
        biased = self._biased(at_full_depth)
        name, full = "raee-serve at full depth", {"exit_layer": "full"}
        yield Peer(name, self._num_layers, self._raee, self.prompts, biased, full)
        every = list(range(1, self._num_layers + 1))
        drafts = ("--speculative-config", json.dumps(NGRAM))
        yield self._vanilla("n-gram drafts", every, self.prompts, self._settings({}), drafts)
        int8 = int8_checkpoint(self._material.checkpoint, self._folder / "int8")
        model = self._material.source.model
        yield Peer(
            "int8 weights",
            self._num_layers,
            lambda: vanilla_system(int8, model),
            self.prompts,
            self._settings(at_full_depth),
        )

    def _raee(self) -> AbstractContextManager[System]:
        return raee_system(self._material.source.model, self._material.source.table)

    def _vanilla(
        self,
        name: str,
        layers: list[int],
        prompts: Prompts,
        settings: Settings,
        flags: Sequence[str] = (),
    ) -> Peer:
        """Vanilla vLLM on a checkpoint of these layers."""
        checkpoint, model = self._material.checkpoint, self._material.source.model
        if len(layers) < self._num_layers:
            target = self._folder / f"{name.replace(' ', '-')}-{len(layers)}"
            checkpoint = checkpoint_of(checkpoint, layers, target)
        return Peer(
            name, len(layers), lambda: vanilla_system(checkpoint, model, flags), prompts, settings
        )

    def _biases_at(self, layer: int) -> Biases:
        biases: dict[str, NDArray[np.float64]] = {}
        for task in self._material.tasks:
            logprobs = self._material.rows(task).label_logprobs
            assert logprobs is not None
            biases[task.name] = calibrated(logprobs).bias[layer - 1]
        return biases

    def _settings(self, biases: Biases) -> Settings:
        """For vanilla vLLM: outputs limited to label words as raee-serve limits them."""
        entries, biased = self._material.table.metadata.tasks, self._biased(biases)

        def settings(task: Task) -> Mapping[str, Any]:
            if task.kind == "free-text":
                return biased(task)
            ids = entries[task.name].label_token_ids
            return {**biased(task), "extra_body": {"allowed_token_ids": list(ids)}}

        return settings

    def _biased(self, biases: Biases) -> Settings:
        entries = self._material.table.metadata.tasks

        def settings(task: Task) -> Mapping[str, Any]:
            if task.kind == "free-text":
                return summarised.settings(task)
            if task.name not in biases:
                return {}
            ids = entries[task.name].label_token_ids
            by_token = zip(ids, biases[task.name].tolist(), strict=True)
            return {"logit_bias": {str(token): -bias for token, bias in by_token}}

        return settings

    def _lines(self, name: str, layers: int | None, own: Timings, theirs: Timings) -> list[Row]:
        """One for label words, one for summaries, as far as they were asked."""

        def depth(timed: Timed) -> float:
            return timed.depth if layers is None else layers / self._num_layers

        def line(kind: str, names: Sequence[str], quality: Row) -> Row:
            speeds = speed({n: own[n] for n in names}, {n: theirs[n] for n in names})
            setting: str | int = "" if layers is None else layers
            return {"way": name, "setting": setting, "prompts": kind, **quality, **speeds}

        rows: list[Row] = []
        labels = {
            task.name: Answers(predicted(task, own[task.name].answers), depth(own[task.name]))
            for task in self._material.tasks
            if task.name in own
        }
        if labels:
            rows.append(line("label words", list(labels), averaged(self._material, labels)))
        summaries = [task.name for task in self._documents.texts if task.name in own]
        if summaries:
            depths = [depth(own[name]) for name in summaries]
            quality = self._documents.scored(own, depths)
            rows.append(line("summaries", summaries, quality))
        return rows
