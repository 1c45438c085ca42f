"""Load what admission needs, and check that it belongs to the backbone, before anything listens."""

from __future__ import annotations

from collections.abc import Sequence
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
from raee_serve.server.sampling import FullDepthSampler
from raee_serve.server.settings import DepthSettings
from raee_serve.server.valves import Valves


def load_gate(
    settings: DepthSettings,
    backbone: BackboneIdentity,
    checkpoint: Path,
    served_names: Sequence[str],
    valves: Valves | None = None,
    access: Access | None = None,
    registry: CollectorRegistry = REGISTRY,
) -> Gate:
    """The gate of a server that serves `backbone` as `served_names`.

    Raises RaeeError for what does not fit it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    valves, access = valves or Valves(), access or Access()
    admission, retriever = _admission(settings, backbone, tokenizer, served_names, valves)
    if not admission.off:
        print(f"raee-serve: valves: {valves}; {access}", flush=True)
    metrics = DecisionMetrics(backbone.num_layers, registry)
    return Gate(
        admission=admission,
        lookups=None if retriever is None else _lookups(retriever, settings, metrics),
        detokenize=partial(_text_of, tokenizer),
        metrics=metrics,
        access=access,
        sampler=FullDepthSampler(valves.sample_full, metrics) if valves.sample_full else None,
        table_version=None if retriever is None else retriever.table_version,
    )


def _text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _admission(
    settings: DepthSettings,
    backbone: BackboneIdentity,
    tokenizer: Any,
    served_names: Sequence[str],
    valves: Valves,
) -> tuple[Admission, ExitRetriever | None]:
    if is_off():
        print(f"raee-serve: {OFF_VARIABLE}=1: every request runs vanilla vLLM", flush=True)
        return Admission(backbone.num_layers, off=True), None
    if settings.table is None:
        return _fixed(settings, backbone, valves), None
    return _retrieved(settings, backbone, tokenizer, served_names, valves)


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


def _retrieved(
    settings: DepthSettings,
    backbone: BackboneIdentity,
    tokenizer: Any,
    served_names: Sequence[str],
    valves: Valves,
) -> tuple[Admission, ExitRetriever]:
    assert settings.table is not None
    retriever = ExitRetriever.open(
        settings.table,
        backbone=backbone,
        encoder=settings.encoder,
        max_distance=settings.max_distance,
        fraction=settings.fraction,
        vote_weight=settings.vote_weight,
    )
    valves.check(retriever.num_layers, retriever.tasks)
    labels = {
        name: LabelOutputs.of(task, retriever.label_token_ids[name], tokenizer)
        for name, task in retriever.tasks.items()
        if task.kind == "labels"
    }
    admission = Admission(
        retriever.num_layers,
        retriever.tasks,
        labels,
        k=settings.k,
        rule=settings.rule,
        served_names=frozenset(served_names),
        valves=valves,
    )
    rules = (f"{name} {settings.rule or c.rule}" for name, c in retriever.choices.items())
    print(
        f"raee-serve: exit table {settings.table}: {retriever.num_rows:,} rows, "
        f"version {retriever.table_version}\n"
        f"raee-serve: tasks and their rules: {', '.join(rules)}\n"
        f"raee-serve: look-ups: time-out {settings.lookup_timeout_ms:g} ms",
        flush=True,
    )
    return admission, retriever


def _lookups(
    retriever: ExitRetriever, settings: DepthSettings, metrics: DecisionMetrics
) -> LookupBatcher:
    retriever.observe = metrics.looked_up
    metrics.table(retriever.table_version, retriever.rows_by_task)
    return LookupBatcher(
        retriever.decide,
        num_layers=retriever.num_layers,
        timeout_s=settings.lookup_timeout_ms / 1000,
        observe_wait=metrics.waited,
    )


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
