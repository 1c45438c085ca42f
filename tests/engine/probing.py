"""Random probes, and what Transformers says of a request that leaves through one of them."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raee_serve.engine.settings import NO_LABEL, label_of, probe_args
from raee_serve.exits.probes import Probe
from tests.engine.reference import last_states
from tests.tiny import ENGINE_SIZES

TOLERANCE = 1e-3
"""Of log-probabilities, and between the two best ones where another label counts as equal."""


@dataclass(frozen=True)
class ProbeRequest:
    """A prompt that leaves after `exit_layer` through `probe`."""

    prompt: list[int]
    exit_layer: int
    set_id: str
    name: str
    bias: list[float]

    @property
    def extra_args(self) -> dict[str, Any]:
        return probe_args(self.exit_layer, self.set_id, self.name, self.bias)


def random_probes(
    labels: dict[str, int], seed: int = 0, hidden_size: int = ENGINE_SIZES["hidden_size"]
) -> dict[str, Probe]:
    """Probes by name. labels: how many labels each of them has."""
    rng = np.random.default_rng(seed)
    return {
        name: Probe(
            rng.normal(0, 0.2, (num_labels, hidden_size)).astype(np.float32),
            rng.normal(0, 1, num_labels).astype(np.float32),
        )
        for name, num_labels in labels.items()
    }


def requests_through(
    probes: dict[str, Probe],
    set_id: str,
    prompts: Sequence[list[int]],
    exit_layers: Sequence[int],
    seed: int = 0,
) -> list[ProbeRequest]:
    """One request for each prompt, through the probes in turn, with random biases."""
    rng, names = random.Random(seed), list(probes)
    requests = []
    for i, (prompt, layer) in enumerate(zip(prompts, exit_layers, strict=True)):
        name = names[i % len(names)]
        bias = [rng.gauss(0, 1) for _ in probes[name].bias]
        requests.append(ProbeRequest(prompt, layer, set_id, name, bias))
    return requests


def expected_logprobs(
    checkpoint: Path, requests: Sequence[ProbeRequest], probes: dict[str, Probe]
) -> list[np.ndarray]:
    """[num_labels] for each request: log-probabilities by an offline run of the cut checkpoint."""
    found: dict[int, np.ndarray] = {}
    for depth in sorted({request.exit_layer for request in requests}):
        there = [i for i, request in enumerate(requests) if request.exit_layer == depth]
        states = last_states(checkpoint, depth, [requests[i].prompt for i in there])
        for i, state in zip(there, states, strict=True):
            scores = probes[requests[i].name].scores(state.numpy()) + requests[i].bias
            found[i] = scores - np.logaddexp.reduce(scores)
    return [found[i] for i in range(len(requests))]


def wrong_labels(
    checkpoint: Path,
    requests: Sequence[ProbeRequest],
    probes: dict[str, Probe],
    outcomes: Sequence[dict[str, Any]],
) -> list[tuple[int, str]]:
    """Requests whose answer, or whose log-probabilities where they asked for some, are wrong.

    Ties are no mistake. Returns (request index, what is wrong).
    """
    wrong = []
    expected = expected_logprobs(checkpoint, requests, probes)
    for i, (outcome, logprobs) in enumerate(zip(outcomes, expected, strict=True)):
        [completion] = outcome["completions"]
        [token] = completion["token_ids"]
        label = label_of(token)
        if label is None or label >= len(logprobs):
            wrong.append((i, f"token {token}"))
        elif logprobs.max() - logprobs[label] > TOLERANCE:
            wrong.append((i, f"label {label}, not {logprobs.argmax()}"))
        wrong += [(i, what) for what in _wrong_logprobs(completion["logprobs"], logprobs)]
    return wrong


def _wrong_logprobs(found: list[dict[str, float]] | None, expected: np.ndarray) -> list[str]:
    wrong = []
    for token, logprob in (found or [{}])[0].items():
        label = label_of(int(token))
        is_label = label is not None and label < len(expected)
        if not math.isclose(logprob, expected[label] if is_label else -math.inf, abs_tol=TOLERANCE):
            wrong.append(f"token {token}: {logprob}")
    return wrong


def has_no_answer(outcome: dict[str, Any]) -> bool:
    return [c["token_ids"] for c in outcome["completions"]] == [[NO_LABEL]]
