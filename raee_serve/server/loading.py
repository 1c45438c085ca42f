"""Load what admission needs, and check that it belongs to the backbone, before anything listens."""

from __future__ import annotations

from collections.abc import Sequence
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
from raee_serve.server.settings import DepthSettings


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
    admission, lookups = (
        _retrieved(settings, backbone, tokenizer, served_names)
        if settings.table
        else _fixed(settings, backbone)
    )
    return Gate(
        admission=admission,
        lookups=lookups,
        detokenize=partial(_text_of, tokenizer),
        metrics=DecisionMetrics(backbone.num_layers),
    )


def _text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _fixed(settings: DepthSettings, backbone: BackboneIdentity) -> tuple[Admission, None]:
    num_layers = backbone.num_layers
    layer = num_layers if settings.exit_layer == "full" else _number(settings.exit_layer)
    if not 1 <= layer <= num_layers:
        raise RaeeError(
            f"--exit-layer is {settings.exit_layer!r}; allowed: 1..{num_layers} or 'full'"
        )
    print(f"raee-serve: every request runs {layer} of {num_layers} layers", flush=True)
    return Admission(num_layers, fixed_layer=layer), None


def _retrieved(
    settings: DepthSettings,
    backbone: BackboneIdentity,
    tokenizer: Any,
    served_names: Sequence[str],
) -> tuple[Admission, LookupBatcher]:
    assert settings.table is not None
    retriever = ExitRetriever.open(
        settings.table,
        backbone=backbone,
        encoder=settings.encoder,
        max_distance=settings.max_distance,
        fraction=settings.fraction,
        vote_weight=settings.vote_weight,
        encoder_backend=settings.encoder_backend,
        rows_in_memory_mb=settings.rows_in_memory_mb,
    )
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
    )
    lookups = LookupBatcher(
        retriever.decide,
        num_layers=retriever.num_layers,
        timeout_s=settings.lookup_timeout_ms / 1000,
    )
    rules = (f"{name} {settings.rule or c.rule}" for name, c in retriever.choices.items())
    print(
        f"raee-serve: exit table {settings.table}: {retriever.num_rows:,} rows\n"
        f"raee-serve: tasks and their rules: {', '.join(rules)}\n"
        f"raee-serve: look-ups: encoder by {retriever.encoder_backend}, rows "
        f"{'through the index' if retriever.searches_index else 'in memory'}, time-out "
        f"{settings.lookup_timeout_ms:g} ms",
        flush=True,
    )
    return admission, lookups


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
