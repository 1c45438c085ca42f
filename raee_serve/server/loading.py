"""Load what admission needs, and check that it belongs to the backbone, before anything listens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

from raee_serve.engine.settings import OFF_VARIABLE, is_off
from raee_serve.errors import RaeeError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.server.access import Access
from raee_serve.server.admission import Admission
from raee_serve.server.gate import Gate
from raee_serve.server.limits import LabelOutputs
from raee_serve.server.lookup import LookupBatcher
from raee_serve.server.metrics import DecisionMetrics
from raee_serve.server.reload import Snapshot, TableReloader
from raee_serve.server.sampling import FullDepthSampler
from raee_serve.server.settings import DepthSettings
from raee_serve.server.valves import Valves
from raee_serve.shortcuts import Shortcuts, stored_shortcuts
from raee_serve.table.store import ExitTable
from raee_serve.tasks.task import prompt_token_ids


def load_gate(
    settings: DepthSettings,
    backbone: BackboneIdentity,
    checkpoint: Path,
    served_names: Sequence[str],
    valves: Valves | None = None,
    access: Access | None = None,
    registry: CollectorRegistry = REGISTRY,
    chat_template: str | None = None,
) -> Gate:
    """The gate of a server that serves `backbone` as `served_names`.

    chat_template: given beside the tokenizer's own, if any.
    Raises RaeeError for what does not fit the backbone.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    valves, access = valves or Valves(), access or Access()
    shortcuts = None if is_off() else _shortcuts(settings, backbone)
    loader = None
    if settings.table is not None and not is_off():
        loader = TableLoader(settings, backbone, tokenizer, served_names, valves, shortcuts)
    retriever = None if loader is None else loader.open()
    admission = replace(
        _without_table(settings, backbone, valves), shortcut_layers=_layers(shortcuts)
    )
    if not admission.off:
        print(f"raee-serve: valves: {valves}; {access}", flush=True)
    metrics = DecisionMetrics(backbone.num_layers, registry)
    gate = Gate(
        admission=admission,
        lookups=None,
        detokenize=partial(_text_of, tokenizer),
        metrics=metrics,
        access=access,
        sampler=FullDepthSampler(valves.sample_full, metrics) if valves.sample_full else None,
        encode=partial(prompt_token_ids, tokenizer),
        has_chat_template=bool(chat_template or tokenizer.chat_template),
    )
    if loader is None or retriever is None:
        return gate
    reloader = TableReloader(loader.load, loader.newest_state, loader.uri)
    return reloader.start(loader.deciding_by(retriever, gate))


def _shortcuts(settings: DepthSettings, backbone: BackboneIdentity) -> Shortcuts | None:
    """Those that the engine is going to load. Raises as `stored_shortcuts`."""
    shortcuts = stored_shortcuts(settings.table, settings.shortcuts_file, backbone)
    if shortcuts is not None:
        layers = ", ".join(map(str, shortcuts.layers))
        print(f"raee-serve: shortcuts {shortcuts.digest} at layers {layers}", flush=True)
    return shortcuts


def _layers(shortcuts: Shortcuts | None) -> tuple[int, ...]:
    return () if shortcuts is None else shortcuts.layers


def _text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _without_table(
    settings: DepthSettings, backbone: BackboneIdentity, valves: Valves
) -> Admission:
    """What decides without an exit table, or until there is one."""
    if is_off():
        print(f"raee-serve: {OFF_VARIABLE}=1: every request runs vanilla vLLM", flush=True)
        return Admission(backbone.num_layers, off=True)
    if settings.table is not None:
        return Admission(backbone.num_layers, valves=valves)
    return _fixed(settings, backbone, valves)


def _fixed(settings: DepthSettings, backbone: BackboneIdentity, valves: Valves) -> Admission:
    num_layers = backbone.num_layers
    valves.check(num_layers, ())
    layer = num_layers if settings.exit_layer == "full" else _number(settings.exit_layer)
    if not valves.min_layer <= layer <= num_layers:
        raise RaeeError(
            f"--exit-layer is {settings.exit_layer!r}; allowed: "
            f"{valves.min_layer}..{num_layers} or 'full'"
        )
    print(f"raee-serve: every request runs {layer} of {num_layers} layers", flush=True)
    return Admission(num_layers, fixed_layer=layer, valves=valves)


class TableLoader:
    """Makes gates that decide by the table; after the first one the encoder stays."""

    def __init__(
        self,
        settings: DepthSettings,
        backbone: BackboneIdentity,
        tokenizer: Any,
        served_names: Sequence[str],
        valves: Valves | None = None,
        shortcuts: Shortcuts | None = None,
    ) -> None:
        assert settings.table is not None
        self.uri = settings.table
        self._settings = settings
        self._backbone = backbone
        self._tokenizer = tokenizer
        self._served_names = tuple(served_names)
        self._valves = valves or Valves()
        self._shortcuts = shortcuts
        self._retriever: ExitRetriever | None = None

    def load(self, gate: Gate) -> Gate:
        """`gate`, deciding by the table as it is now. Raises RaeeError for what does not fit."""
        return self.deciding_by(self.open(), gate)

    def open(self) -> ExitRetriever:
        """Of the table as it is now. Raises RaeeError for what does not fit."""
        settings = self._settings
        retriever = ExitRetriever.open(
            self.uri,
            backbone=self._backbone,
            encoder=settings.encoder,
            max_distance=settings.max_distance,
            budget=settings.budget,
            shortcuts=self._shortcuts,
            encoder_backend=settings.encoder_backend,
            rows_in_memory_mb=settings.rows_in_memory_mb,
            old=self._retriever,
            exit_points=settings.exit_points,
        )
        self._valves.check(retriever.num_layers, retriever.tasks)
        print(
            f"raee-serve: exit table {self.uri}: {retriever.num_rows:,} rows, version "
            f"{retriever.table_version}\n"
            f"raee-serve: tasks: {', '.join(self._described(retriever))}\n"
            f"raee-serve: look-ups: encoder by {retriever.encoder_backend}, rows "
            f"{'through the index' if retriever.searches_index else 'in memory'}, time-out "
            f"{settings.lookup_timeout_ms:g} ms",
            flush=True,
        )
        return retriever

    def deciding_by(self, retriever: ExitRetriever, gate: Gate) -> Gate:
        """`gate`, deciding by the retriever's table. Raises BindingError."""
        version, rows = retriever.table_version, retriever.rows_by_task
        admission = self._admission(retriever)  # what does not fit is said here, if at all
        self._retriever = retriever
        retriever.observe = gate.metrics.looked_up
        return replace(
            gate,
            admission=admission,
            lookups=self._lookups(retriever, gate),
            snapshot=Snapshot(version, retriever.table_state, rows),
            probe_set=retriever.probe_set,
        )

    def _described(self, retriever: ExitRetriever) -> Iterator[str]:
        """Each task with its head and budget."""
        for name, task in retriever.tasks.items():
            head = "free text"
            if task.kind == "labels":
                head = self._settings.head or retriever.heads[name]
            yield f"{name} ({head}, budget {retriever.choices[name].budget:g})"

    def newest_state(self) -> str:
        """Of the table, as `Snapshot.state`; it changes with the table."""
        return ExitTable.open(self.uri).state

    def _admission(self, retriever: ExitRetriever) -> Admission:
        labels = {
            name: LabelOutputs.of(
                task,
                retriever.plain_token_ids.get(name, ()),
                self._tokenizer,
                is_fitted=retriever.heads[name] == "probe",
            )
            for name, task in retriever.tasks.items()
            if task.kind == "labels"
        }
        admission = Admission(
            retriever.num_layers,
            retriever.tasks,
            labels,
            k=self._settings.k,
            head=self._settings.head,
            served_names=self._served_names,
            valves=self._valves,
            shortcut_layers=_layers(self._shortcuts),
            probe_set="" if retriever.probe_set is None else retriever.probe_set.id,
        )
        admission.check_heads()
        return admission

    def _lookups(self, retriever: ExitRetriever, gate: Gate) -> LookupBatcher:
        if gate.lookups is not None:
            return gate.lookups.successor(retriever.decide)
        return LookupBatcher(
            retriever.decide,
            num_layers=retriever.num_layers,
            timeout_s=self._settings.lookup_timeout_ms / 1000,
            observe_wait=gate.metrics.waited,
        )


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
