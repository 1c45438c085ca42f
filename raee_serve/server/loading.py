"""Load what admission needs, and check that it belongs to the backbone, before anything listens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from raee_serve.errors import RaeeError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.server.admission import Admission
from raee_serve.server.gate import Gate
from raee_serve.server.limits import LabelOutputs
from raee_serve.server.lookup import LookupBatcher
from raee_serve.server.metrics import DecisionMetrics
from raee_serve.server.reload import Snapshot, TableReloader
from raee_serve.server.settings import DepthSettings
from raee_serve.table.store import ExitTable


def load_gate(
    settings: DepthSettings,
    backbone: BackboneIdentity,
    checkpoint: Path,
    served_names: Sequence[str],
) -> Gate:
    """The gate of a server that serves `backbone` as `served_names`.

    Raises RaeeError for what does not fit it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    gate = Gate(
        admission=Admission(backbone.num_layers),
        lookups=None,
        detokenize=partial(_text_of, tokenizer),
        metrics=DecisionMetrics(backbone.num_layers),
    )
    if settings.table is None:
        return replace(gate, admission=_fixed(settings, backbone))
    loader = TableLoader(settings, backbone, tokenizer, served_names)
    return TableReloader(loader.load, loader.newest_state, settings.table).start(gate)


def _text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _fixed(settings: DepthSettings, backbone: BackboneIdentity) -> Admission:
    num_layers = backbone.num_layers
    layer = num_layers if settings.exit_layer == "full" else _number(settings.exit_layer)
    if not 1 <= layer <= num_layers:
        raise RaeeError(
            f"--exit-layer is {settings.exit_layer!r}; allowed: 1..{num_layers} or 'full'"
        )
    print(f"raee-serve: every request runs {layer} of {num_layers} layers", flush=True)
    return Admission(num_layers, fixed_layer=layer)


class TableLoader:
    """Makes gates that decide by the table; after the first one the encoder stays."""

    def __init__(
        self,
        settings: DepthSettings,
        backbone: BackboneIdentity,
        tokenizer: Any,
        served_names: Sequence[str],
    ) -> None:
        assert settings.table is not None
        self._uri = settings.table
        self._settings = settings
        self._backbone = backbone
        self._tokenizer = tokenizer
        self._served_names = frozenset(served_names)
        self._retriever: ExitRetriever | None = None

    def load(self, gate: Gate) -> Gate:
        """`gate`, deciding by the table as it is now. Raises RaeeError for what does not fit."""
        state, settings = self.newest_state(), self._settings
        retriever = ExitRetriever.open(
            self._uri,
            backbone=self._backbone,
            encoder=settings.encoder,
            max_distance=settings.max_distance,
            fraction=settings.fraction,
            vote_weight=settings.vote_weight,
            old=self._retriever,
        )
        admission = self._admission(retriever)
        lookups = (
            LookupBatcher(
                retriever.decide,
                num_layers=retriever.num_layers,
                timeout_s=settings.lookup_timeout_ms / 1000,
            )
            if gate.lookups is None
            else gate.lookups.successor(retriever.decide)
        )
        snapshot = Snapshot(retriever.table_version, state, retriever.rows_by_task)
        rules = (f"{name} {settings.rule or c.rule}" for name, c in retriever.choices.items())
        print(
            f"raee-serve: exit table {self._uri}: {retriever.num_rows:,} rows, version "
            f"{retriever.table_version}\n"
            f"raee-serve: tasks and their rules: {', '.join(rules)}\n"
            f"raee-serve: look-ups: time-out {settings.lookup_timeout_ms:g} ms",
            flush=True,
        )
        self._retriever = retriever
        return replace(gate, admission=admission, lookups=lookups, snapshot=snapshot)

    def newest_state(self) -> str:
        """Of the table, as `Snapshot.state`; it changes with the table."""
        return ExitTable.open(self._uri).state

    def _admission(self, retriever: ExitRetriever) -> Admission:
        labels = {
            name: LabelOutputs.of(task, retriever.label_token_ids[name], self._tokenizer)
            for name, task in retriever.tasks.items()
            if task.kind == "labels"
        }
        return Admission(
            retriever.num_layers,
            retriever.tasks,
            labels,
            k=self._settings.k,
            rule=self._settings.rule,
            served_names=self._served_names,
        )


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
